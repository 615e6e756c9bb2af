"""When running sequences will end, from how fast tokens come and how long answers have been."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from stagemesh.stages.engine.sequence import Sequence

SOON_S = 0.5
"""Who waits so long for a place hardly notices it."""
MEASURED_OVER_S = 0.5
MEAN_OVER = 16
"""Answers over which their length is averaged, the later ones counting more."""


class Forecast:
    """Used in the engine's thread, when the lane reports."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mean_tokens = math.inf  # of an answer
        self._token_s = math.inf  # between two tokens of a sequence
        self._measured_at, self._measured_tokens = clock(), 0

    def ended(self, num_tokens: int) -> None:
        """An answer was complete with `num_tokens`."""
        if math.isinf(self._mean_tokens):
            self._mean_tokens = num_tokens
        else:
            self._mean_tokens += (num_tokens - self._mean_tokens) / MEAN_OVER

    def num_ending(self, running: SequenceOf[Sequence], num_generated: int) -> int:
        """How many of `running` end within SOON_S. num_generated: tokens of the lane so far."""
        now = self._clock()
        if (passed := now - self._measured_at) >= MEASURED_OVER_S:
            tokens = num_generated - self._measured_tokens
            self._token_s = passed * len(running) / tokens if tokens and running else math.inf
            self._measured_at, self._measured_tokens = now, num_generated
        num_tokens = SOON_S / self._token_s
        return sum(self._rest(sequence) <= num_tokens for sequence in running)

    def _rest(self, sequence: Sequence) -> float:
        """Tokens until it ends. A longer answer than most goes on for as long as most take."""
        if sequence.params.pooling is not None:
            return 0.0
        rest = self._mean_tokens - sequence.num_output_tokens
        return min(sequence.max_num_tokens - sequence.num_tokens, rest if rest > 0 else self._mean_tokens)

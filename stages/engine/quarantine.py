"""Sequences of a step that failed, tried again one at a time: what one request does stays with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from stagemesh.stages.engine.sequence import Sequence, SequenceStatus

TOKENS_ALONE = 2
"""A suspect that brings so many tokens alone, one from a prompt and one from a decode, may run with others again."""
MAX_HANGS_ALONE = 2
"""A step also hangs when a rank is stopped from outside; hardly twice for the same request."""
MAX_FAILURES = 4
"""A sequence that passes alone and is in so many failed steps with others ends as well, or it would go on for ever."""


class Quarantine:
    """While it holds a sequence, only that one is scheduled."""

    def __init__(self) -> None:
        self._suspects: deque[Sequence] = deque()
        self._num_tokens = 0
        self._num_hangs = 0
        self._num_failures: dict[Sequence, int] = {}

    @property
    def current(self) -> Sequence | None:
        """The sequence to try alone now; None: all may run."""
        while self._suspects and self._suspects[0].status is SequenceStatus.FINISHED:
            self._next()
        return self._suspects[0] if self._suspects else None

    def accuse(self, sequences: Iterable[Sequence], *, is_hang: bool) -> list[Sequence]:
        """Sequences of a failed step, which are to be tried alone; returns those that are to blame instead.

        is_hang: the step had no result in time, rather than that it raised.
        """
        guilty = []
        for sequence in sequences:
            if sequence is self.current:
                self._num_hangs += is_hang
                if not is_hang or self._num_hangs >= MAX_HANGS_ALONE:
                    guilty.append(sequence)
                continue
            failures = self._num_failures[sequence] = self._num_failures.get(sequence, 0) + 1
            if failures >= MAX_FAILURES:
                guilty.append(sequence)
            elif sequence not in self._suspects:
                self._suspects.append(sequence)
        return guilty

    def took_token(self, sequence: Sequence) -> bool:
        """Whether this token, taken alone, has cleared the sequence."""
        if sequence is not self.current:
            return False
        self._num_tokens += 1
        if self._num_tokens < TOKENS_ALONE:
            return False
        self._next()
        return True

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._num_failures.pop(sequence, None)

    def _next(self) -> None:
        self._suspects.popleft()
        self._num_tokens = self._num_hangs = 0

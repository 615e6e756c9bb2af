"""What a request changes about the logits of its next token, worked out on the leader.

A pure function of prompt and output, so an answer is the same alone, batched, after preemption and on another lane.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.grammar import Grammar, TokenMask, token_mask
from stagemesh.stages.messages.step import LogitsAdjustments


class LogitsProcessor:
    """Of one request. Its methods take outputs in any order."""

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int], grammar: Grammar | None) -> None:
        self._params = params
        self._grammar = grammar
        self._allowed = None if params.allowed_token_ids is None else token_mask(params.allowed_token_ids)
        bias = sorted(params.logit_bias.items())
        self._bias_ids = array("i", [token_id for token_id, _ in bias]).tobytes()
        self._bias = array("f", [value for _, value in bias]).tobytes()
        self._repeats = params.repetition_penalty != 1.0
        self._has_penalties = self._repeats or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self._prompt_ids = array("i", sorted(set(prompt_token_ids))).tobytes() if self._repeats else b""
        self._counts: dict[int, int] = {}
        self._num_counted = 0

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_token_ids: Sequence[int], grammar: Grammar | None = None
    ) -> LogitsProcessor | None:
        """None for a request that leaves the logits as they are."""
        processor = cls(params, prompt_token_ids, grammar)
        is_limited = grammar is not None or params.allowed_token_ids is not None or params.bad_words_token_ids
        return processor if is_limited or params.logit_bias or processor._has_penalties else None

    @property
    def error(self) -> str:
        """As in Grammar."""
        return "" if self._grammar is None else self._grammar.error

    def adjustments(self, output_token_ids: Sequence[int], banned_token_ids: Sequence[int]) -> LogitsAdjustments:
        """For the token after `output_token_ids`, which may be none of `banned_token_ids`."""
        if self._has_penalties:
            self._count(output_token_ids)
        return LogitsAdjustments(
            allowed=self._allowed_now(output_token_ids, banned_token_ids),
            bias_ids=self._bias_ids,
            bias=self._bias,
            repetition_penalty=self._params.repetition_penalty,
            frequency_penalty=self._params.frequency_penalty,
            presence_penalty=self._params.presence_penalty,
            prompt_ids=self._prompt_ids,
            output_ids=array("i", self._counts).tobytes(),
            output_counts=array("i", self._counts.values()).tobytes(),
        )

    def bad_endings(self, output_token_ids: Sequence[int]) -> list[int]:
        """The token ids that would complete a bad word."""
        endings = []
        for word in self._params.bad_words_token_ids:
            num_before = len(word) - 1
            start = len(output_token_ids) - num_before
            if start >= 0 and list(output_token_ids[start:]) == list(word[:num_before]):
                endings.append(word[-1])
        return endings

    def _allowed_now(self, output_token_ids: Sequence[int], banned_token_ids: Sequence[int]) -> bytes:
        """All limits as one mask. A limit that would leave no token is ignored: min_tokens where a grammar allows only
        EOS, allowed_token_ids where they contradict the grammar."""
        grammar = None if self._grammar is None else self._grammar.mask(output_token_ids)
        mask = _intersection(grammar, self._allowed)
        if mask is None or not banned_token_ids:
            return b"" if mask is None else mask.tobytes()
        ids = np.array([token_id for token_id in banned_token_ids if 0 <= token_id < 8 * len(mask)], np.int64)
        not_banned = mask.copy()
        np.bitwise_and.at(not_banned, ids >> 3, ~(1 << (ids & 7)).astype(np.uint8))
        return (not_banned if not_banned.any() else mask).tobytes()

    def _count(self, output_token_ids: Sequence[int]) -> None:
        if len(output_token_ids) < self._num_counted:
            self._counts.clear()
            self._num_counted = 0
        for token_id in output_token_ids[self._num_counted :]:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self._num_counted = len(output_token_ids)


def _intersection(first: TokenMask | None, second: TokenMask | None) -> TokenMask | None:
    """Both masks, or the one that there is; the first where no token is in both."""
    if first is None or second is None:
        return second if first is None else first
    size = min(len(first), len(second))
    both = first[:size] & second[:size]
    return both if both.any() else first

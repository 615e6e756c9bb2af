"""Log-probabilities of tokens: with the tokens' text, and in the shapes of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stagemesh.deployments.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from stagemesh.stages.messages.step import TokenLogprobs
from stagemesh.stages.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not know; vLLM's number."""


class DecodedLogprob(msgspec.Struct, frozen=True):
    """How likely the model found a token, with its text."""

    token_id: int
    token: str
    """U+FFFD where it is part of a character only."""
    bytes: list[int]
    logprob: float
    rank: int | None
    """1 for the likeliest token."""
    top: list[DecodedLogprob] = []
    """The likeliest tokens, falling."""
    offset: int = 0
    """Characters of the answer before it."""


class LogprobDecoder:
    """Puts text to the log-probabilities of one answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def report(self, logprobs: Sequence[TokenLogprobs]) -> list[DecodedLogprob]:
        reports = []
        for entry in logprobs:
            top = [
                self._report(token_id, logprob, rank)
                for rank, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1)
            ]
            reports.append(self._report(entry.token_id, entry.logprob, entry.rank, top))
            self._offset += len(reports[-1].token)
        return reports

    def _report(self, token_id: int, logprob: float, rank: int, top: Sequence[DecodedLogprob] = ()) -> DecodedLogprob:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", "replace")
        return DecodedLogprob(token_id, text, list(data), max(logprob, LEAST_LOGPROB), rank, list(top), self._offset)


def completion_logprobs(reports: list[DecodedLogprob]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[report.token for report in reports],
        token_logprobs=[report.logprob for report in reports],
        top_logprobs=[{entry.token: entry.logprob for entry in (*report.top, report)} for report in reports],
        text_offset=[report.offset for report in reports],
    )


def chat_logprobs(reports: list[DecodedLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                report.token,
                report.logprob,
                report.bytes,
                [TopLogprob(entry.token, entry.logprob, entry.bytes) for entry in report.top],
            )
            for report in reports
        ]
    )


def prompt_logprobs(reports: Sequence[DecodedLogprob]) -> PromptLogprobs:
    entries: PromptLogprobs = [None]
    for report in reports:
        # The likeliest first, the prompt's own token where they end unless it is among them.
        tokens = {entry.token_id: entry for entry in (report, *report.top)}
        by_rank = sorted(tokens.values(), key=lambda entry: entry.rank or 0)
        entries.append({e.token_id: PromptLogprob(e.logprob, e.rank, e.token) for e in by_rank})
    return entries

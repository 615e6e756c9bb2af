"""Log-probabilities in the shapes of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.deployments.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from stagemesh.stages.text.output import DecodedLogprob


def completion_logprobs(logprobs: list[DecodedLogprob]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[logprob.token for logprob in logprobs],
        token_logprobs=[logprob.logprob for logprob in logprobs],
        top_logprobs=[{entry.token: entry.logprob for entry in (*logprob.top, logprob)} for logprob in logprobs],
        text_offset=[logprob.offset for logprob in logprobs],
    )


def chat_logprobs(logprobs: list[DecodedLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                logprob.token,
                logprob.logprob,
                list(logprob.bytes),
                [TopLogprob(entry.token, entry.logprob, list(entry.bytes)) for entry in logprob.top],
            )
            for logprob in logprobs
        ]
    )


def prompt_logprobs(logprobs: Sequence[DecodedLogprob]) -> PromptLogprobs:
    entries: PromptLogprobs = [None]
    for logprob in logprobs:
        # Likeliest first; the prompt's own token comes last unless it is among them.
        tokens = {entry.token_id: entry for entry in (logprob, *logprob.top)}
        by_rank = sorted(tokens.values(), key=lambda entry: entry.rank)
        entries.append({e.token_id: PromptLogprob(e.logprob, e.rank, e.token) for e in by_rank})
    return entries

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
from stagemesh.stages.text.tokenizer import Tokenizer


def completion_logprobs(
    logprobs: Sequence[DecodedLogprob], *, as_ids: bool = False, first_offset: int = 0
) -> CompletionLogprobs:
    """as_ids: "token_id:N" in place of texts. first_offset: characters before the answer."""
    return CompletionLogprobs(
        tokens=[_token(logprob, as_ids) for logprob in logprobs],
        token_logprobs=[logprob.logprob for logprob in logprobs],
        top_logprobs=[
            {_token(entry, as_ids): entry.logprob for entry in (logprob, *logprob.top)} for logprob in logprobs
        ],
        text_offset=[first_offset + logprob.offset for logprob in logprobs],
    )


def echoed_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[DecodedLogprob], text: str, tokenizer: Tokenizer, *, as_ids: bool
) -> CompletionLogprobs:
    """Of a prompt that is part of an answer; null for its first token, which nothing comes before.

    logprobs: of the tokens after the first. text: what is shown; special tokens that it does not show take no room.
    """
    first = tokenizer.token_bytes(token_ids[0]).decode("utf-8", "replace")
    rest = completion_logprobs(logprobs, as_ids=as_ids, first_offset=len(first))
    num_hidden = max(0, tokenizer.decode(token_ids, skip_special_tokens=False).find(text))
    return CompletionLogprobs(
        [f"token_id:{token_ids[0]}" if as_ids else first, *rest.tokens],
        [None, *rest.token_logprobs],
        [None, *rest.top_logprobs],
        [min(max(0, offset - num_hidden), len(text)) for offset in (0, *rest.text_offset)],
    )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def chat_logprobs(logprobs: Sequence[DecodedLogprob], *, as_ids: bool = False) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                _token(logprob, as_ids),
                logprob.logprob,
                list(logprob.bytes),
                [TopLogprob(_token(entry, as_ids), entry.logprob, list(entry.bytes)) for entry in logprob.top],
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


def _token(entry: DecodedLogprob, as_ids: bool) -> str:
    return f"token_id:{entry.token_id}" if as_ids else entry.token

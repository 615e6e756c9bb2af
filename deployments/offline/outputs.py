"""What `LLM` returns: vLLM's result objects, field by field."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from stagemesh.stages.text.input import ProcessedPrompt
from stagemesh.stages.text.output import DecodedLogprob, OutputProcessor, output_processors
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_calls import ToolCall

OutputT = TypeVar("OutputT")


@dataclass
class RequestMetrics:
    """Of one prompt, in seconds of `time.time()`."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    """1 for the likeliest."""
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    """Of the prompt's `n` answers."""
    text: str
    token_ids: Sequence[int]
    """Includes the token that ended the answer."""
    cumulative_logprob: float | None = None
    """If logprobs were requested."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per generated token: itself and the likeliest ones, by token id."""
    finish_reason: str | None = None
    """"stop" or "length"."""
    stop_reason: int | str | None = None
    """The stop string or stop token id; None for EOS and "length"."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    """If `LLM.chat` had a tool_choice."""
    seed: int | None = None
    """With it and n=1, the same prompt and parameters give this answer again."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    """None for a prompt of token ids only."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token; None for the first."""
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    """Prompt tokens from the prefix cache."""
    lora_request: None = None


@dataclass
class EmbeddingOutput:
    embedding: list[float] = field(repr=False)

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class PoolingOutput:
    data: Any
    """float32 tensor [hidden_size]."""


@dataclass
class PoolingRequestOutput(Generic[OutputT]):
    """One text and its pooled hidden states."""

    request_id: str
    outputs: OutputT
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """One text and its vector."""


@dataclass
class ScoringOutput:
    score: float


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Two texts and their likeness."""


class RequestState:
    """One prompt on its way to a RequestOutput."""

    def __init__(self, request_id: str, prompt: str | None, processed: ProcessedPrompt, tokenizer: Tokenizer) -> None:
        """tokenizer: makes the answers' text."""
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = processed.token_ids
        self._metrics = RequestMetrics(time.time())
        self.choices = output_processors([processed], tokenizer)

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def tick(self) -> None:
        """Note that a token came."""
        now = self._metrics.last_token_time = time.time()
        self._metrics.first_token_time = self._metrics.first_token_time or now
        self._metrics.finished_time = now if self.is_finished else None

    def output(self) -> RequestOutput:
        first = self.choices[0]
        prompt_logprobs = first.prompt_logprobs
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[_completion(choice) for choice in self.choices],
            prompt_logprobs=None if prompt_logprobs is None else [None, *map(_by_token_id, prompt_logprobs)],
            metrics=self._metrics,
            num_cached_tokens=first.num_cached_tokens,
        )


def _completion(choice: OutputProcessor) -> CompletionOutput:
    has_logprobs = choice.request.params.logprobs is not None
    return CompletionOutput(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        cumulative_logprob=sum(entry.logprob for entry in choice.logprobs) if has_logprobs else None,
        logprobs=[_by_token_id(entry) for entry in choice.logprobs] if has_logprobs else None,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        tool_calls=choice.tool_calls,
        seed=choice.seed,
    )


def _by_token_id(entry: DecodedLogprob) -> dict[int, Logprob]:
    """The token itself, then the likeliest ones."""
    return {e.token_id: Logprob(e.logprob, e.rank, e.token) for e in (entry, *entry.top)}

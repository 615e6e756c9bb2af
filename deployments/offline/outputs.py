"""What the offline classes return: vLLM's result objects, field by field, so that a script for them reads these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RequestMetrics:
    """When things happened to one prompt, in seconds of `time.time()`."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class Logprob:
    """How likely the model found a token."""

    logprob: float
    rank: int | None = None
    """1 for the likeliest."""
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer."""

    index: int
    """Which of the prompt's `n` answers."""
    text: str
    token_ids: Sequence[int]
    """All generated tokens, the one that ended the answer included."""
    cumulative_logprob: float | None = None
    """Sum over the answer's tokens, where logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each generated token: itself and the likeliest ones, by token id."""
    finish_reason: str | None = None
    """"stop" or "length"."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the answer; None for the model's own end and for "length"."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """One prompt and its answers."""

    request_id: str
    prompt: str | None
    """None where the prompt was given as token ids only."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """The same for each token of the prompt; None for the first, which nothing comes before."""
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    lora_request: None = None


@dataclass
class EmbeddingOutput:
    """The vector of one text."""

    embedding: list[float] = field(repr=False)

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """One text and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass
class PoolingOutput:
    """The pooled hidden states of one text."""

    data: Any
    """float32 tensor [hidden_size]."""


@dataclass
class PoolingRequestOutput:
    """One text and what pooling made of it."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0

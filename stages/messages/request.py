"""What travels between routers and leaders: requests, their tokens, and the stats of a lane."""

from __future__ import annotations

from typing import Literal

import msgspec

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.messages.step import TokenLogprobs


class TokenDelta(msgspec.Struct, array_like=True):
    """New tokens of one request after a step."""

    request_id: str
    offset: int
    """Index of the first of `token_ids` in the answer; a gap or an overlap is a protocol error."""
    token_ids: list[int]
    finish_reason: str | None = None
    """None while running; else "stop" (EOS or a stop id), "length", "abort", "error"."""
    stop_token_id: int | None = None
    """The stop or EOS id that ended it, also the last of token_ids."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    error: str = ""
    """With finish_reason "error": what went wrong."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token id, if the request asked for them."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens after the first; on the first delta of a request that asked for them."""
    embedding: bytes = b""
    """float32: the prompt's vector, if the request is for that; its only delta."""


class TokenBatch(msgspec.Struct, array_like=True):
    """All new tokens of one router's requests after one turn of the engine's loop."""

    lane: str
    deltas: list[TokenDelta]


class LaneStats(msgspec.Struct, array_like=True):
    """The state and load of a lane, published to the routers when it changes, at most ten times a second."""

    lane: str
    """The leader's Serve replica id."""
    state: str
    """"starting" | "serving" | "healing" | "failed"."""
    epoch: int
    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    """Prompt tokens admitted or waiting whose KV is not computed yet."""
    running_kv_tokens: int
    num_blocks: int
    num_free_blocks: int
    """Free or evictable."""
    num_preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache so far."""
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    schedule_s: float
    """Sum over steps: scheduling, sending the plan, processing the result."""
    step_overhead_s: float
    """Sum over steps: what each took beside its time inside the model and its waits for other steps. It includes
    scheduling as far as a step had to wait for that."""
    model_s: float
    """Sum over steps and stages: inside the model."""
    block_size: int
    expert_tokens: list[int] = []
    """As in WorkerStats, over the life and all stages of the lane."""
    expert_imbalance: float = 0.0
    """The mean over all MoE layers of the lane, as last reported; 0 before a report."""


class EngineRequest(msgspec.Struct):
    """One choice of one prompt. Its answer is a pure function of these fields, so it can be computed again anywhere."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    """With a definite seed, max_tokens that fit the model, and bad words as token ids."""
    reply_to: str = ""
    """Where its tokens go, in the terms of the lane's TokenSink: the address of a router's PULL socket, say."""


class RequestSummary(msgspec.Struct):
    """What `generate` returns when the request has ended, so that the router can check that no token is missing."""

    request_id: str
    num_tokens: int
    finish_reason: str
    error: str = ""


LaneStatus = Literal["unavailable", "overloaded", "lost", "timeout", "internal"]


class LaneError(RuntimeError):
    """A lane could not take or finish a request. `deployments/ingress/errors.py` says what the client sees.

    status: "unavailable" no lane can generate now; "overloaded" queues are full, try again later;
    "lost" the lane died on the way; "timeout" a deadline passed; "internal" a lane broke its own protocol.
    """

    def __init__(self, status: LaneStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(status, message)

    def __str__(self) -> str:
        return self.message

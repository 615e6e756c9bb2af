"""Messages between routers and leaders: requests, tokens, stats."""

from __future__ import annotations

from typing import Literal

import msgspec

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.messages.step import TokenLogprobs


class TokenDelta(msgspec.Struct, array_like=True):
    """New tokens of one request after a step."""

    request_id: str
    offset: int
    """Index in the answer of the first of `token_ids`; a gap or an overlap is a protocol error."""
    token_ids: list[int]
    finish_reason: str | None = None
    """None while running; else "stop" (EOS or a stop id), "length", "abort", "error", or "unsatisfiable": no answer has
    the form that the request asks for."""
    stop_token_id: int | None = None
    """The stop or EOS id that ended it, the last of token_ids."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    error: str = ""
    """With finish_reason "error" and "unsatisfiable"."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token id; None if not wanted."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens after the first; on the first delta, if wanted."""
    embedding: bytes = b""
    """float32: the vector of a pooled prompt, in its only delta."""
    attempt: int = 0
    """That of the EngineRequest which it answers: a router drops the deltas of attempts that it has given up."""


class TokenBatch(msgspec.Struct, array_like=True):
    """New tokens of one router's requests after one turn of the engine's loop."""

    lane: str
    deltas: list[TokenDelta]


class LaneStats(msgspec.Struct, array_like=True):
    """State and load of a lane, published when they change, at most ten times a second. Sums are over its life."""

    lane: str
    """The leader's Serve replica id."""
    state: str
    """"starting" | "serving" | "healing" | "failed"."""
    epoch: int
    num_running: int
    num_waiting: int
    room: int
    """How many requests the lane takes, running and waiting: those that it can run at once and those that may wait,
    by default as many as will find a place at once because others end. 0: not known yet."""
    queued_prefill_tokens: int
    """Tokens of running and waiting sequences without KV yet."""
    running_kv_tokens: int
    num_blocks: int
    num_free_blocks: int
    """Free or evictable."""
    num_preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    schedule_s: float
    """Scheduling, sending plans, processing results."""
    step_overhead_s: float
    """Time of steps outside the model and not waiting for other steps; includes scheduling that a step waited for."""
    model_s: float
    """Inside the model, summed over stages."""
    block_size: int
    expert_tokens: list[int] = []
    """As in WorkerStats, over all stages."""
    expert_imbalance: float = 0.0
    """Mean over all MoE layers, as last reported; 0 before a report."""


class EngineRequest(msgspec.Struct):
    """One choice of one prompt. Its answer is a pure function of these fields: any lane can compute it again."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    """With a seed, max_tokens that fit the model, and bad words as token ids."""
    reply_to: str = ""
    """For the lane's TokenSink, such as the address of a router's PULL socket; empty: nobody reads the tokens."""
    priority: int = 0
    """Lower ones go first (vLLM's order)."""
    output_token_ids: list[int] = []
    """The answer so far, from another lane: this one goes on behind it."""
    cache_salt: str = ""
    """Only requests of the same one share blocks of the prefix cache."""
    attempt: int = 0
    """Rises whenever the request is sent to a lane again; deltas repeat it."""


class RequestSummary(msgspec.Struct):
    """How a request ended; shows whether a token is missing."""

    request_id: str
    num_tokens: int
    finish_reason: str
    error: str = ""


LaneStatus = Literal["unavailable", "overloaded", "lost", "timeout", "internal"]


class LaneError(RuntimeError):
    """A lane could not take or finish a request. `deployments/ingress/errors.py` says what the client sees.

    status: "unavailable" no lane can generate now; "overloaded" queues are full; "lost" the lane died;
    "timeout" a deadline passed; "internal" a lane broke its protocol.
    """

    def __init__(self, status: LaneStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(status, message)

    def __str__(self) -> str:
        return self.message

"""What a leader and its workers tell each other to form a lane. No torch: the leader's process does without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoints:
    """What a worker opened for an epoch."""

    plan_address: str
    store_port: int | None
    """Port of the rendezvous store; only from global rank 0."""


@dataclass(frozen=True)
class Wiring:
    """A worker's place in the lane for one epoch."""

    epoch: int
    store_host: str
    store_port: int
    results_to: str
    """Address of the leader's result socket."""
    sampled_tokens_to: tuple[str, ...]
    """Addresses of the plan sockets of stage 0, by TP rank: whoever samples sends them the tokens too."""
    num_blocks: int
    """KV blocks of the lane: the least that any of its ranks has room for."""


@dataclass(frozen=True)
class Progress:
    """Where a worker is, for whoever must name the one that is stuck."""

    stage: int
    tp_rank: int
    epoch: int
    step: int
    phase: str
    seconds: float
    """Time in this phase so far."""

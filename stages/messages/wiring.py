"""What a leader and its workers tell each other to form a lane. No torch: the leader's process does without it."""

from __future__ import annotations

from collections.abc import Mapping
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


def make_wiring(
    epoch: int, endpoints_by_rank: Mapping[tuple[int, int], Endpoints], results_to: str, num_blocks: int
) -> Wiring:
    """The wiring of an epoch from what every rank (stage, tp_rank) of the lane has opened for it."""
    first = endpoints_by_rank[0, 0]
    return Wiring(
        epoch=epoch,
        store_host=first.plan_address.removeprefix("tcp://").rpartition(":")[0],
        store_port=first.store_port or 0,
        results_to=results_to,
        sampled_tokens_to=tuple(
            endpoints.plan_address for (stage, _), endpoints in sorted(endpoints_by_rank.items()) if stage == 0
        ),
        num_blocks=num_blocks,
    )


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

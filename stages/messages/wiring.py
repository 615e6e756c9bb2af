"""How the workers of a lane meet in an epoch: each opens sockets, then all get the one `Wiring` made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Rank = tuple[int, int]
"""(stage, tp_rank)"""


@dataclass(frozen=True)
class Endpoints:
    """What a worker opened for an epoch."""

    plan_address: str
    store_port: int | None
    """Port of the rendezvous store; only of stage 0, tp rank 0, and None in a lane of one rank."""


@dataclass(frozen=True)
class Wiring:
    """What every worker of a lane is told for one epoch."""

    epoch: int
    store_host: str
    store_port: int
    """0 in a lane of one rank, which has no store."""
    results_to: str
    """Address of the leader's result socket."""
    sampled_tokens_to: tuple[str, ...]
    """Plan sockets of stage 0, by TP rank: the rank that samples sends its tokens there too."""
    num_blocks: int
    """KV blocks of the lane: the least that any of its ranks has room for."""


def make_wiring(epoch: int, endpoints: Mapping[Rank, Endpoints], results_to: str, num_blocks: int) -> Wiring:
    """The wiring of an epoch, from what every rank has opened for it. results_to: the leader's result socket."""
    first = endpoints[0, 0]
    return Wiring(
        epoch=epoch,
        store_host=first.plan_address.removeprefix("tcp://").rpartition(":")[0],
        store_port=first.store_port or 0,
        results_to=results_to,
        sampled_tokens_to=tuple(endpoints[rank].plan_address for rank in sorted(endpoints) if rank[0] == 0),
        num_blocks=num_blocks,
    )


@dataclass(frozen=True)
class Progress:
    """What a worker is doing, so that a stuck one can be named."""

    stage: int
    tp_rank: int
    epoch: int
    step: int
    phase: str
    seconds: float
    """Time in this phase so far."""

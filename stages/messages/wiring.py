"""How the workers of a lane meet in an epoch: each opens sockets, then all get one `Wiring`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

Rank = tuple[int, int]
"""(stage, tp_rank)"""


def new_epoch(previous: int = 0) -> int:
    """A number that no other epoch of any lane has, above `previous`: microseconds since 1970 and ten random bits.

    Messages name their epoch; one that another leader, or nobody, began is dropped.
    """
    return max(previous + 1, (time.time_ns() // 1000 << 10) | secrets.randbits(10))


@dataclass(frozen=True)
class Endpoints:
    plan_address: str
    store_port: int | None
    """Of the rendezvous store, which stage 0, tp rank 0 has in a lane of several ranks; else None."""


@dataclass(frozen=True)
class Wiring:
    """What every worker of a lane is told in an epoch."""

    epoch: int
    store_host: str
    store_port: int
    """0 without a store."""
    results_to: str
    """Address of the leader's result socket."""
    sampled_tokens_to: tuple[str, ...]
    """Plan sockets of stage 0, by TP rank, for the rank that samples."""
    num_blocks: int
    """KV blocks: the least that any rank has room for."""


def make_wiring(epoch: int, endpoints: Mapping[Rank, Endpoints], results_to: str, num_blocks: int) -> Wiring:
    """endpoints: of every rank."""
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
    """What a worker is doing, to name a stuck one."""

    stage: int
    tp_rank: int
    epoch: int
    step: int
    phase: str
    seconds: float
    """In this phase so far."""

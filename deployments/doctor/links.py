"""Latency and bandwidth between ranks, over what a lane's ranks use: `DistGroup` and `DistTransport`.

`measure` runs in one process per rank. All ranks walk through the same exercises, one at a time, so that none shares
its link with another.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from stagemesh.deployments.doctor.facts import Link

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]

    from stagemesh.stages.layers.tensor_parallel import DistGroup
    from stagemesh.stages.worker.transport import DistTransport

SMALL_BYTES, LARGE_BYTES = 4 * 2**10, 16 * 2**20
"""The activations of one token, and of a prefill of some thousand."""
SMALL_ROUNDS, LARGE_ROUNDS, WARM_UP_ROUNDS = 30, 5, 2
MAX_ALL_PAIRS = 6
"""With more ranks only neighbours are measured, which is where activations travel."""
MEET_TIMEOUT_S = 60.0
"""For all ranks to meet, and for each exercise."""


class Place(msgspec.Struct, frozen=True):
    """Where a rank is."""

    node: str
    """Its address."""
    device: str
    """cpu, or cuda:0 of those that its process sees."""
    label: str
    """For people: `10.0.0.1 cuda:3`."""


class Exercise(msgspec.Struct, frozen=True):
    kind: str
    ranks: tuple[int, ...]


def exercises(places: Sequence[Place]) -> list[Exercise]:
    """All-reduce in each node and over all ranks; point to point in all pairs, or between neighbours if many."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank, place in enumerate(places):
        by_node[place.node].append(rank)
    everyone = tuple(range(len(places)))
    groups = dict.fromkeys([*(tuple(ranks) for ranks in by_node.values() if len(ranks) > 1), everyone])
    pairs = itertools.combinations(everyone, 2) if len(places) <= MAX_ALL_PAIRS else itertools.pairwise(everyone)
    return [*(Exercise("all_reduce", ranks) for ranks in groups), *(Exercise("p2p", pair) for pair in pairs)]


def measure(places: Sequence[Place], rank: int, store: Store) -> list[Link]:
    """Called by every rank; the links that this one is the first of. Raises what torch raises, also at a deadline.

    store: where the ranks meet; it may be closed when all have returned.
    """
    import torch
    import torch.distributed as dist

    device = torch.device(places[rank].device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=MEET_TIMEOUT_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=len(places), timeout=timeout)
    links = []
    try:
        for number, exercise in enumerate(exercises(places)):
            # A send may still be under way, and ends with its transport: kept until all have what was sent.
            over = _connection(exercise, rank)
            if rank in exercise.ranks:
                small_s, large_s = _times(exercise, rank, over, device)
                if rank == exercise.ranks[0]:
                    links.append(_link(exercise, places, backend, small_s, large_s))
            store.set(f"exercise-{number}-{rank}", "done")
            store.wait([f"exercise-{number}-{other}" for other in range(len(places))], timeout)
    finally:
        dist.destroy_process_group()
    return links


def _connection(exercise: Exercise, rank: int) -> DistGroup | DistTransport:
    """Every rank calls it, as torch.distributed asks for when it makes a group."""
    import torch.distributed as dist

    from stagemesh.stages.layers.tensor_parallel import DistGroup
    from stagemesh.stages.worker.transport import DistTransport

    if exercise.kind == "p2p":
        peer = next(other for other in exercise.ranks if other != rank)
        return DistTransport(peer, peer)
    group = dist.new_group(list(exercise.ranks))
    return DistGroup(group) if rank in exercise.ranks else DistTransport(None, None)


def _times(exercise: Exercise, rank: int, over: DistGroup | DistTransport, device: torch.device) -> tuple[float, float]:
    """Seconds of a small and of a large message."""
    import torch

    from stagemesh.stages.layers.tensor_parallel import DistGroup

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def times(num_bytes: int, rounds: int) -> float:
        x = torch.zeros(num_bytes // 4, device=device)
        if isinstance(over, DistGroup):
            return _median_s(lambda: over.all_reduce(x), rounds, sync)
        into = torch.empty_like(x)

        def there_and_back() -> None:
            if rank == exercise.ranks[0]:
                over.send(0, x)
                over.receive(0, into)
            else:
                over.send(0, over.receive(0, into))

        return _median_s(there_and_back, rounds, sync) / 2

    return times(SMALL_BYTES, SMALL_ROUNDS), times(LARGE_BYTES, LARGE_ROUNDS)


def _median_s(run: Callable[[], object], rounds: int, sync: Callable[[], None]) -> float:
    seconds = []
    for _ in range(WARM_UP_ROUNDS + rounds):
        started = time.perf_counter()
        run()
        sync()
        seconds.append(time.perf_counter() - started)
    return median(seconds[WARM_UP_ROUNDS:])


def _link(exercise: Exercise, places: Sequence[Place], backend: str, small_s: float, large_s: float) -> Link:
    size = len(exercise.ranks)
    share = 2 * (size - 1) / size if exercise.kind == "all_reduce" else 1.0
    return Link(
        kind=exercise.kind,
        transport=backend,
        places=tuple(places[rank].label for rank in exercise.ranks),
        is_inside_node=len({places[rank].node for rank in exercise.ranks}) == 1,
        latency_us=small_s * 1e6,
        bandwidth_gbps=share * LARGE_BYTES / large_s / 1e9,
    )

"""The tensor-parallel group of ShardWorker actors that one stage replica owns."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.rendezvous import PhaseError, gather_ranks, timed
from stagemesh.deployments.lane.worker_actor import ShardWorker

logger = logging.getLogger("ray.serve")

RESPAWN_PAUSE_S = 1.0
"""Between two failed attempts to bring a dead rank back."""


@dataclass(frozen=True)
class GroupState:
    """A group as its lane sees it; a new one whenever something changes."""

    generation: int
    """Rises with every change of the workers."""
    workers: tuple[ActorHandle, ...] = ()
    """By tp_rank; empty while the group is down."""
    num_blocks: int = 0
    """KV blocks that every rank of the group has room for."""
    reason: str = ""
    """Why it is down."""

    @property
    def is_up(self) -> bool:
        return bool(self.workers)


@dataclass
class _Rank:
    worker: ActorHandle | None = None
    num_blocks: int = 0
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)


def rank_resources(config: EngineConfig) -> dict[str, float]:
    """What one rank takes of a node: its bundle in a placement group."""
    own = {"CPU": config.num_cpus_per_worker}
    return {**own, "GPU": 1} if config.device == "cuda" else own


class WorkerGroup:
    """Makes the workers inside a placement group, loads them, and replaces those that die.

    Survivors of a death keep their weights: only the dead rank is made and loaded again.
    """

    def __init__(self, config: EngineConfig, stage: int, placement: PlacementGroup | None = None) -> None:
        """`placement`: one bundle per rank; None for that of the replica that this runs in, whose first bundle
        is the replica's own."""
        self._placement = placement
        self._config = config
        self._stage = stage
        self._ranks = [_Rank() for _ in range(config.plan.tp_size)]
        self._state = GroupState(0, reason="not started")
        self._changed = asyncio.Condition()
        self._repair: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring all ranks up; raises PhaseError with stage, rank and phase where that fails."""
        await self._bring_up(range(len(self._ranks)))

    async def states(self) -> AsyncIterator[GroupState]:
        """The present state, then every new one; never ends."""
        seen = -1
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._state.generation != seen)  # noqa: B023
                state = self._state
            seen = state.generation
            yield state

    def close(self) -> None:
        """End the workers; safe to call twice and after a failed start."""
        if self._repair is not None:
            self._repair.cancel()
        for rank in self._ranks:
            if rank.watcher is not None:
                rank.watcher.cancel()
            if rank.worker is not None:
                ray.kill(rank.worker)
            rank.worker = rank.watcher = None

    async def _bring_up(self, tp_ranks: range | list[int]) -> None:
        for tp_rank in tp_ranks:
            self._ranks[tp_rank].worker = self._spawn(tp_rank)
        await self._phase("placement", tp_ranks, "pid")
        await self._phase("weights", tp_ranks, "load")
        blocks = await self._phase("KV profile", tp_ranks, "profile")
        for tp_rank in tp_ranks:
            rank = self._ranks[tp_rank]
            rank.num_blocks = blocks[self._stage, tp_rank]
            assert rank.worker is not None
            rank.watcher = asyncio.create_task(self._watch(tp_rank, rank.worker))
        await self._set_state(
            workers=tuple(rank.worker for rank in self._ranks if rank.worker is not None),
            num_blocks=min(rank.num_blocks for rank in self._ranks),
        )

    async def _phase(self, phase: str, tp_ranks: range | list[int], method: str) -> dict[tuple[int, int], Any]:
        """Call `method` on some ranks, log the time it took, and hold it to the deadline."""
        calls = {(self._stage, r): getattr(self._ranks[r].worker, method).remote() for r in tp_ranks}
        with timed(f"stage {self._stage}", phase):
            return await gather_ranks(phase, calls, self._config.startup_timeout_s)

    def _spawn(self, tp_rank: int) -> ActorHandle:
        resources = rank_resources(self._config)
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._placement or ray.util.get_current_placement_group(),
            placement_group_bundle_index=tp_rank if self._placement else 1 + tp_rank,
        )
        return ShardWorker.options(  # type: ignore[attr-defined]  # ray.remote adds it
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=strategy,
        ).remote(self._config, self._stage, tp_rank)

    async def _watch(self, tp_rank: int, worker: ActorHandle) -> None:
        try:
            await worker.watch.remote()
        except ray.exceptions.RayError as error:
            reason = f"stage {self._stage} rank {tp_rank} died: {error.__class__.__name__}"
        logger.warning("%s", reason)
        rank = self._ranks[tp_rank]
        rank.worker = rank.watcher = None
        await self._set_state(reason=reason)
        if self._repair is None or self._repair.done():
            self._repair = asyncio.create_task(self._repair_all())

    async def _repair_all(self) -> None:
        while dead := [i for i, rank in enumerate(self._ranks) if rank.worker is None]:
            try:
                await self._bring_up(dead)
            except PhaseError as error:
                logger.error("%s; trying again", error)
                for tp_rank in dead:
                    rank = self._ranks[tp_rank]
                    if rank.worker is not None and rank.watcher is None:
                        ray.kill(rank.worker)
                        rank.worker = None
                await asyncio.sleep(RESPAWN_PAUSE_S)

    async def _set_state(self, workers: tuple[ActorHandle, ...] = (), num_blocks: int = 0, reason: str = "") -> None:
        complete = workers if len(workers) == len(self._ranks) else ()
        async with self._changed:
            self._state = GroupState(self._state.generation + 1, complete, num_blocks, reason)
            self._changed.notify_all()

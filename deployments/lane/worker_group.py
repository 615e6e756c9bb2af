"""The tensor-parallel group of ShardWorkers of one stage replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.rendezvous import PhaseError, gather_ranks, timed
from stagemesh.deployments.lane.worker_actor import ShardWorker
from stagemesh.stages.messages.wiring import Rank

logger = logging.getLogger("ray.serve")

RESPAWN_PAUSE_S = 1.0
"""After the first attempt to replace a dead rank that failed; twice as long after each further one."""
MAX_REPAIRS = 5
"""Attempts that fail one after another: then the group gives up, and its replica is to be replaced."""
STOP_TIMEOUT_S = 3.0
"""For a worker to answer `stop`."""


@dataclass(frozen=True)
class GroupState:
    """What a lane knows of a group."""

    generation: int
    """Rises with every change."""
    workers: tuple[ActorHandle, ...] = ()
    """By tp_rank; empty while the group is down."""
    num_blocks: int = 0
    """KV blocks that fit on every rank."""
    reason: str = ""
    """Why it is down."""

    @property
    def is_up(self) -> bool:
        return bool(self.workers)


@dataclass
class _Member:
    worker: ActorHandle | None = None
    num_blocks: int = 0
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)


def rank_resources(config: EngineConfig) -> dict[str, float]:
    """One rank's placement bundle."""
    cpu = {"CPU": config.num_cpus_per_worker}
    return {**cpu, "GPU": 1} if config.device == "cuda" else cpu


def workers_by_rank(states: Sequence[GroupState]) -> dict[Rank, ActorHandle]:
    """states: by stage."""
    return {
        (stage, tp_rank): worker for stage, state in enumerate(states) for tp_rank, worker in enumerate(state.workers)
    }


class WorkerGroup:
    """Makes, loads and replaces the workers; when one dies, the others keep their weights."""

    def __init__(self, config: EngineConfig, stage: int, placement: PlacementGroup | None = None) -> None:
        """placement: one bundle per rank; None = this Serve replica's, whose bundle 0 is its own."""
        self._placement = placement
        self._config = config
        self._stage = stage
        self._members = [_Member() for _ in range(config.plan.tp_size)]
        self._state = GroupState(0, reason="not started")
        self._changed = asyncio.Condition()
        self._repair: asyncio.Task[None] | None = None
        self._gave_up = ""

    async def start(self) -> None:
        """Raises PhaseError."""
        await self._bring_up(range(len(self._members)))

    async def states(self) -> AsyncIterator[GroupState]:
        """The state now and after changes; never ends."""
        seen = -1
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._state.generation != seen)  # noqa: B023
                state = self._state
            seen = state.generation
            yield state

    def check_health(self) -> None:
        """Raises RuntimeError if the group cannot repair itself."""
        if self._gave_up:
            raise RuntimeError(f"stage {self._stage} gave up after {MAX_REPAIRS} attempts: {self._gave_up}")
        for task in (self._repair, *(member.watcher for member in self._members)):
            if task is not None and task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise RuntimeError(f"stage {self._stage} is no longer repaired: {error!r}") from error

    async def stop_run(self) -> None:
        """End whatever epoch runs in the workers. One that does not answer is killed, and replaced."""
        calls = {asyncio.ensure_future(m.worker.stop.remote(None)): m.worker for m in self._members if m.worker}
        if not calls:
            return
        _, silent = await asyncio.wait(calls, timeout=STOP_TIMEOUT_S)
        for call, worker in calls.items():
            if call in silent:
                logger.error(
                    "stage %d: a worker did not answer `stop` within %g s, killed", self._stage, STOP_TIMEOUT_S
                )
                call.cancel()
                ray.kill(worker)
            else:
                call.exception()  # of one that has died: its watcher knows

    def close(self) -> None:
        """Safe to call twice, and after a `start` that failed."""
        if self._repair is not None:
            self._repair.cancel()
        for member in self._members:
            if member.watcher is not None:
                member.watcher.cancel()
            if member.worker is not None:
                ray.kill(member.worker)
            member.worker = member.watcher = None

    async def _bring_up(self, tp_ranks: Sequence[int]) -> None:
        for tp_rank in tp_ranks:
            self._members[tp_rank].worker = self._spawn(tp_rank)
        await self._phase("placement", tp_ranks, "pid")
        await self._phase("weights", tp_ranks, "load")
        blocks = await self._phase("KV profile", tp_ranks, "profile")
        for tp_rank in tp_ranks:
            member = self._members[tp_rank]
            member.num_blocks = blocks[self._stage, tp_rank]
            assert member.worker is not None
            member.watcher = asyncio.create_task(self._watch(tp_rank, member.worker))
        await self._set_state(
            workers=tuple(member.worker for member in self._members if member.worker is not None),
            num_blocks=min(member.num_blocks for member in self._members),
        )

    async def _phase(self, phase: str, tp_ranks: Sequence[int], method: str) -> dict[Rank, Any]:
        """Call `method` on some ranks; raises PhaseError."""
        calls = {(self._stage, r): getattr(self._members[r].worker, method).remote() for r in tp_ranks}
        with timed(f"stage {self._stage}", phase):
            return await gather_ranks(phase, calls, self._config.startup_timeout_s)

    def _spawn(self, tp_rank: int) -> ActorHandle:
        resources = rank_resources(self._config)
        owner = None if self._placement else ray.get_runtime_context().current_actor
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._placement or ray.util.get_current_placement_group(),
            placement_group_bundle_index=tp_rank if self._placement else 1 + tp_rank,
        )
        return ShardWorker.options(  # type: ignore[attr-defined]  # ray.remote adds it
            num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), scheduling_strategy=strategy
        ).remote(self._config, self._stage, tp_rank, owner)

    async def _watch(self, tp_rank: int, worker: ActorHandle) -> None:
        try:
            await worker.watch.remote()
        except ray.exceptions.RayError as error:
            reason = f"stage {self._stage} rank {tp_rank} died: {type(error).__name__}"
            ray.kill(worker)  # where only its connection broke, it still has the device that its successor needs
        logger.warning("%s", reason)
        member = self._members[tp_rank]
        member.worker = member.watcher = None
        await self._set_state(reason=reason)
        if self._repair is None or self._repair.done():
            self._repair = asyncio.create_task(self._repair_all())

    async def _repair_all(self) -> None:
        num_failed = 0
        while dead := [i for i, member in enumerate(self._members) if member.worker is None]:
            try:
                await self._bring_up(dead)
                num_failed = 0
            except PhaseError as error:
                num_failed += 1
                logger.error("%s; attempt %d of %d", error, num_failed, MAX_REPAIRS)
                for tp_rank in dead:
                    member = self._members[tp_rank]
                    if member.worker is not None and member.watcher is None:
                        ray.kill(member.worker)
                        member.worker = None
                if num_failed == MAX_REPAIRS:
                    self._gave_up = str(error)
                    await self._set_state(reason=self._gave_up)
                    return
                await asyncio.sleep(RESPAWN_PAUSE_S * 2 ** (num_failed - 1))

    async def _set_state(self, workers: tuple[ActorHandle, ...] = (), num_blocks: int = 0, reason: str = "") -> None:
        complete = workers if len(workers) == len(self._members) else ()
        async with self._changed:
            self._state = GroupState(self._state.generation + 1, complete, num_blocks, reason)
            self._changed.notify_all()

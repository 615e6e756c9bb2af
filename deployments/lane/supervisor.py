"""Wiring a lane: leases for the later stages, one epoch after another, healing when anything breaks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import ray
import zmq
from ray.serve.handle import DeploymentHandle

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.rendezvous import PhaseError, Rank, progress, timed, wire
from stagemesh.deployments.lane.worker_group import GroupState, WorkerGroup
from stagemesh.stages.engine.engine import Engine
from stagemesh.stages.messages.channel import LeaderChannel

logger = logging.getLogger("ray.serve")

RETRY_PAUSE_S = 0.3
STOP_TIMEOUT_S = 5.0
"""A survivor of a broken epoch that has not left its run loop by then is taken for hung, and killed."""


class Lane:
    """The supervisor of one lane: keeps a group of every stage, wires them, heals. Lives in the leader."""

    def __init__(
        self,
        config: EngineConfig,
        lane: str,
        context: zmq.Context[zmq.Socket[bytes]],
        own_group: WorkerGroup,
        later_stages: list[DeploymentHandle[Any]],
        engine: Engine,
    ) -> None:
        self._config = config
        self._lane = lane
        self._context = context
        self._engine = engine
        self._own_group = own_group
        self._later_stages = later_stages
        self._host = ray.util.get_node_ip_address()
        self._states = [GroupState(0, reason="not leased yet") for _ in range(1 + len(later_stages))]
        self._changed = asyncio.Event()
        self._failure: str | None = None
        self._epoch = 0
        self._serving = asyncio.Event()
        self._broken_since: float | None = None
        self._last_error = ""
        self._tasks: list[asyncio.Task[None]] = []
        self.num_blocks = 0

    async def start(self) -> None:
        """Lease, wire, and return when the lane runs; TimeoutError says what it still waited for, RuntimeError why
        it never will."""
        self._broken_since = time.monotonic()
        self._tasks = [asyncio.create_task(self._follow(0, self._own_group.states()))]
        for stage, handle in enumerate(self._later_stages, start=1):
            self._tasks.append(asyncio.create_task(self._hold(stage, handle)))
        self._tasks.append(asyncio.create_task(self._supervise()))
        timeout_s = 2 * self._config.startup_timeout_s
        serving = asyncio.create_task(self._serving.wait())
        try:
            await asyncio.wait({serving, *self._tasks}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
        self.check_health()
        if not serving.done():
            raise TimeoutError(f"lane {self._lane} was not whole within {timeout_s:g} s: {self._waiting_for()}")

    def step_failed(self, epoch: int, reason: str) -> None:
        """The engine saw a step fail (called in this loop's thread)."""
        if epoch == self._epoch:
            self._failure = reason
            self._changed.set()

    def check_health(self) -> None:
        for task in self._tasks:  # they run for as long as the lane does
            if task.done() and not task.cancelled():
                raise RuntimeError(f"lane {self._lane} lost its supervisor: {task.exception()!r}")
        if self._broken_since is None:
            return
        broken_s = time.monotonic() - self._broken_since
        if broken_s > 3 * self._config.startup_timeout_s:
            raise RuntimeError(f"lane {self._lane} has been broken for {broken_s:.0f} s: {self._waiting_for()}")

    def close(self) -> None:
        """End the leases; safe to call twice."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    # -- the groups of the lane --------------------------------------------------------------------------

    async def _follow(self, stage: int, states: AsyncIterator[GroupState]) -> None:
        async for state in states:
            self._set_state(stage, state)

    async def _hold(self, stage: int, handle: DeploymentHandle[Any]) -> None:
        """Hold a replica of `stage`; when its lease ends, hold another."""
        leader = ray.get_runtime_context().current_actor
        while True:
            stream = handle.options(stream=True).lease.remote(leader, self._lane)
            try:
                await self._follow(stage, stream)
                reason = "the lease ended"
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except Exception as error:  # whatever ends a lease, the answer is another one
                reason = f"the lease broke: {type(error).__name__}"
            logger.warning("lane %s: stage %d: %s", self._lane, stage, reason)
            self._set_state(stage, GroupState(-1, reason=reason))
            await asyncio.sleep(RETRY_PAUSE_S)

    def _set_state(self, stage: int, state: GroupState) -> None:
        self._states[stage] = state
        self._changed.set()

    # -- epochs ------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            await self._until(lambda: all(state.is_up for state in self._states))
            states = list(self._states)
            workers = {
                (stage, tp_rank): worker
                for stage, state in enumerate(states)
                for tp_rank, worker in enumerate(state.workers)
            }
            self._failure = None
            self._epoch += 1
            runs: dict[Rank, asyncio.Task[None]] = {}
            try:
                with timed(f"lane {self._lane}", f"rendezvous of epoch {self._epoch}"):
                    channel = await self._wire(workers, min(state.num_blocks for state in states))
                runs = {rank: asyncio.ensure_future(worker.run.remote()) for rank, worker in workers.items()}
                await asyncio.wrap_future(self._engine.attach(channel, self._epoch, self.num_blocks))
                self._serving.set()
                self._broken_since = None
                reason = await self._until_broken(states, runs)
            except PhaseError as error:
                reason = str(error)
            self._last_error = reason
            self._serving.clear()
            self._broken_since = self._broken_since or time.monotonic()
            logger.warning("lane %s: epoch %d is over: %s", self._lane, self._epoch, reason)
            await asyncio.wrap_future(self._engine.detach("healing"))
            await self._stop(workers, runs)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _wire(self, workers: dict[Rank, Any], num_blocks: int) -> LeaderChannel:
        # The number of blocks is fixed by the first wiring: the scheduler's tables outlive an epoch.
        num_blocks = self.num_blocks or num_blocks
        channel = await wire(self._config, self._context, self._host, self._epoch, workers, num_blocks)
        self.num_blocks = num_blocks
        return channel

    async def _until_broken(self, states: list[GroupState], runs: dict[Rank, asyncio.Task[None]]) -> str:
        """Wait until a group changes, a run loop ends or a step fails; says which."""
        for task in runs.values():
            task.add_done_callback(lambda _: self._changed.set())

        def broken() -> bool:
            return (
                self._failure is not None
                or any(old is not new for old, new in zip(states, self._states, strict=True))
                or any(task.done() for task in runs.values())
            )

        await self._until(broken)
        reasons = [
            f"stage {stage}: {state.reason}"
            for stage, state in enumerate(self._states)
            if not state.is_up and state is not states[stage]
        ]
        for (stage, tp_rank), task in runs.items():
            if task.done() and (error := task.exception()) is not None:
                reasons.append(f"stage {stage} rank {tp_rank}: {type(error).__name__}: {str(error)[-300:]}")
        return "; ".join([*([self._failure] if self._failure else []), *reasons]) or "the wiring changed"

    async def _stop(self, workers: dict[Rank, Any], runs: dict[Rank, asyncio.Task[None]]) -> None:
        """Get the survivors out of their run loops. A rank that does not come is hung: it is killed."""
        if not runs:
            return
        for worker in workers.values():
            worker.stop.remote(self._epoch)
        if self._failure is not None and "step_timeout_s" in self._failure:
            await self._kill_stuck(workers)
        _, pending = await asyncio.wait(runs.values(), timeout=STOP_TIMEOUT_S)
        for rank, task in runs.items():
            if task in pending:
                who = f"lane {self._lane}: stage {rank[0]} rank {rank[1]}"
                logger.error("%s did not stop within %g s, killed", who, STOP_TIMEOUT_S)
                ray.kill(workers[rank])
                task.cancel()
            elif not task.cancelled():
                task.exception()  # seen: asyncio need not warn of it

    async def _kill_stuck(self, workers: dict[Rank, Any]) -> None:
        """Name and kill the rank that a step waits for: one that does not answer, else the one that has
        been in the model for longest (the others wait for its activations or its part of a sum)."""
        answers = await progress(workers)
        for answer in filter(None, answers.values()):
            logger.error("lane %s: %s", self._lane, answer)
        silent = [rank for rank, answer in answers.items() if answer is None]
        in_model = {rank: a.seconds for rank, a in answers.items() if a is not None and a.phase == "model"}
        busy = sorted(in_model, key=lambda rank: -in_model[rank])
        for rank in silent or busy[:1]:
            logger.error("lane %s: stage %d rank %d is stuck, killed", self._lane, *rank)
            ray.kill(workers[rank])

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _waiting_for(self) -> str:
        down = [f"stage {i} ({s.reason})" for i, s in enumerate(self._states) if not s.is_up]
        return ", ".join(down) or self._last_error or "the rendezvous"

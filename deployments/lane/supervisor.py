"""Leases, epochs and healing of a lane, in the leader's event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import ray
import zmq
from ray.serve.handle import DeploymentHandle

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.rendezvous import PhaseError, progress, start_epoch, timed
from stagemesh.deployments.lane.worker_group import GroupState, WorkerGroup, workers_by_rank
from stagemesh.stages.engine.engine import Engine, TokenSink
from stagemesh.stages.engine.lane import StepTimeout
from stagemesh.stages.messages.wiring import Rank

logger = logging.getLogger("ray.serve")

RETRY_PAUSE_S = 0.3
STOP_TIMEOUT_S = 5.0
"""A rank still in the run loop of a broken epoch by then is killed."""


class LaneSupervisor:
    """A lane's engine and worker groups, wired again whenever one is lost; meanwhile requests wait in `engine`."""

    def __init__(
        self,
        config: EngineConfig,
        lane: str,
        context: zmq.Context[zmq.Socket[bytes]],
        own_group: WorkerGroup,
        later_stages: Sequence[DeploymentHandle[Any]],
        sink: TokenSink,
    ) -> None:
        """own_group: of stage 0. The caller closes it and `context`."""
        self._config = config
        self._lane = lane
        self._context = context
        self._own_group = own_group
        self._later_stages = later_stages
        self._states = [GroupState(0, reason="not leased yet") for _ in range(1 + len(later_stages))]
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._serving = asyncio.Event()
        self._epoch = 0
        self._failure: Exception | None = None
        """Why a step of this epoch failed."""
        self._broken_since: float | None = None
        self._last_error = ""
        self._tasks: list[asyncio.Task[None]] = []
        self.num_blocks = 0
        self.engine = Engine(config, lane, sink, self._step_failed)

    async def start(self) -> None:
        """Return when the lane serves. TimeoutError names what is missing, RuntimeError why it never will serve."""
        self._broken_since = time.monotonic()
        self._tasks = [asyncio.create_task(self._follow(0, self._own_group.states()))]
        for stage, handle in enumerate(self._later_stages, start=1):
            self._tasks.append(asyncio.create_task(self._keep_lease(stage, handle)))
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

    def check_health(self) -> None:
        """Raises RuntimeError if the lane cannot heal, or has not for three start-up deadlines."""
        for task in self._tasks:  # they run for as long as the lane does
            if task.done() and not task.cancelled():
                raise RuntimeError(f"lane {self._lane} lost its supervisor: {task.exception()!r}")
        if self._broken_since is None:
            return
        broken_s = time.monotonic() - self._broken_since
        if broken_s > 3 * self._config.startup_timeout_s:
            raise RuntimeError(f"lane {self._lane} has been broken for {broken_s:.0f} s: {self._waiting_for()}")

    def close(self) -> None:
        """Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self.engine.close()

    # -- the groups of the lane --------------------------------------------------------------------------

    async def _follow(self, stage: int, states: AsyncIterator[GroupState]) -> None:
        async for state in states:
            self._set_state(stage, state)

    async def _keep_lease(self, stage: int, handle: DeploymentHandle[Any]) -> None:
        """Lease a replica of `stage`, and another when the lease ends."""
        leader = ray.get_runtime_context().current_actor
        while True:
            stream = handle.options(stream=True).lease.remote(leader, self._lane)
            try:
                await self._follow(stage, stream)
                reason = "the lease ended"
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except Exception as error:  # whatever broke the lease, another is needed
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
            workers = workers_by_rank(states)
            # Fixed by the first epoch: the scheduler's block tables outlive it.
            num_blocks = self.num_blocks or min(state.num_blocks for state in states)
            self._failure = None
            self._epoch += 1
            runs: dict[Rank, asyncio.Task[None]] = {}
            try:
                with timed(f"lane {self._lane}", f"rendezvous of epoch {self._epoch}"):
                    runs = await start_epoch(self._config, self._context, self.engine, self._epoch, workers, num_blocks)
                self.num_blocks = num_blocks
                self._serving.set()
                self._broken_since = None
                reason = await self._until_broken(states, runs)
            except PhaseError as error:
                reason = str(error)
            self._last_error = reason
            self._serving.clear()
            self._broken_since = self._broken_since or time.monotonic()
            logger.warning("lane %s: epoch %d is over: %s", self._lane, self._epoch, reason)
            await asyncio.wrap_future(self.engine.detach("healing"))
            await self._stop(workers, runs)
            await asyncio.sleep(RETRY_PAUSE_S)

    def _step_failed(self, epoch: int, error: Exception) -> None:
        """Called in the engine's thread."""

        def note() -> None:
            if epoch == self._epoch:
                self._failure = error
                self._changed.set()

        self._loop.call_soon_threadsafe(note)

    async def _until_broken(self, states: list[GroupState], runs: dict[Rank, asyncio.Task[None]]) -> str:
        """Until a group changes, a run loop ends or a step fails; returns the reason."""
        for run in runs.values():
            run.add_done_callback(lambda _: self._changed.set())

        def broken() -> bool:
            return (
                self._failure is not None
                or any(old is not new for old, new in zip(states, self._states, strict=True))
                or any(run.done() for run in runs.values())
            )

        await self._until(broken)
        reasons = [f"{type(self._failure).__name__}: {self._failure}"] if self._failure else []
        for stage, state in enumerate(self._states):
            if not state.is_up and state is not states[stage]:
                reasons.append(f"stage {stage}: {state.reason}")
        for (stage, tp_rank), run in runs.items():
            if run.done() and (error := run.exception()) is not None:
                reasons.append(f"stage {stage} rank {tp_rank}: {type(error).__name__}: {str(error)[-300:]}")
        return "; ".join(reasons) or "the wiring changed"

    async def _stop(self, workers: dict[Rank, Any], runs: dict[Rank, asyncio.Task[None]]) -> None:
        """Get the ranks out of their run loops; kill those that do not leave."""
        if not runs:
            return
        for worker in workers.values():
            worker.stop.remote(self._epoch)
        if isinstance(self._failure, StepTimeout):
            await self._kill_stuck(workers)
        _, pending = await asyncio.wait(runs.values(), timeout=STOP_TIMEOUT_S)
        for rank, run in runs.items():
            if run in pending:
                who = f"lane {self._lane}: stage {rank[0]} rank {rank[1]}"
                logger.error("%s did not stop within %g s, killed", who, STOP_TIMEOUT_S)
                ray.kill(workers[rank])
                run.cancel()
            elif not run.cancelled():
                run.exception()  # else asyncio warns that nobody retrieved it

    async def _kill_stuck(self, workers: dict[Rank, Any]) -> None:
        """Kill ranks that do not answer, else the one longest in the model, for which the others wait."""
        progress_of = await progress(workers)
        for state in filter(None, progress_of.values()):
            logger.error("lane %s: %s", self._lane, state)
        silent = [rank for rank, state in progress_of.items() if state is None]
        in_model = {rank: s.seconds for rank, s in progress_of.items() if s is not None and s.phase == "model"}
        longest_first = sorted(in_model, key=lambda rank: -in_model[rank])
        for rank in silent or longest_first[:1]:
            logger.error("lane %s: stage %d rank %d is stuck, killed", self._lane, *rank)
            ray.kill(workers[rank])

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _waiting_for(self) -> str:
        down = [f"stage {i} ({s.reason})" for i, s in enumerate(self._states) if not s.is_up]
        return ", ".join(down) or self._last_error or "the rendezvous"

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
from stagemesh.config.fingerprint import fingerprint
from stagemesh.deployments.lane.rendezvous import PhaseError, progress, start_epoch, timed
from stagemesh.deployments.lane.stage import LeaseRefused
from stagemesh.deployments.lane.worker_group import GroupState, WorkerGroup, workers_by_rank
from stagemesh.stages.engine.engine import Engine, TokenSink
from stagemesh.stages.engine.lane import StepTimeout
from stagemesh.stages.messages.wiring import Rank, new_epoch

logger = logging.getLogger("ray.serve")

RETRY_PAUSE_S = 0.3
REFUSED_PAUSE_S = 3.0
"""After a replica has refused a lease: another one may accept it, or this one may be replaced."""
LEASE_PATIENCE_S = 10.0
"""How long a stage is kept, or waited for, while an earlier one is not leased. Then it is given back."""
STOP_TIMEOUT_S = 8.0
"""A rank still in the run loop of a broken epoch by then is killed. Ray takes 5 s to kill a process that does not
react, and the ranks that wait for it leave only then."""


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
        """own_group: of stage 0, not started. The caller closes it and `context`."""
        self._config = config
        self._lane = lane
        self._fingerprint = ""
        self._context = context
        self._own_group = own_group
        self._later_stages = later_stages
        self._states = [GroupState(0, reason="loading")]
        self._states += [GroupState(0, reason="not leased yet") for _ in later_stages]
        self._leased: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._serving = asyncio.Event()
        self._epoch = 0
        self._failure: Exception | None = None
        """Why a step of this epoch failed."""
        self._started_at = 0.0
        self._last_error = ""
        self._tasks: list[asyncio.Task[None]] = []
        self.num_blocks = 0
        self.engine = Engine(config, lane, sink, self._step_failed)

    async def start(self) -> None:
        """Return when the lane serves. TimeoutError names what is missing, RuntimeError why it never will serve.

        This stage loads while the others are leased. PhaseError if it cannot.
        """
        self._started_at = time.monotonic()
        self._fingerprint = await asyncio.to_thread(fingerprint, self._config)
        for stage, handle in enumerate(self._later_stages, start=1):
            self._tasks.append(asyncio.create_task(self._keep_lease(stage, handle)))
        self._tasks.append(asyncio.create_task(self._supervise()))
        await self._own_group.start()
        self._tasks.append(asyncio.create_task(self._follow(0, self._own_group.states())))
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
        """Raises RuntimeError if the lane cannot heal, or has completed no step for three start-up deadlines."""
        for task in self._tasks:  # they run for as long as the lane does
            if task.done() and not task.cancelled():
                raise RuntimeError(f"lane {self._lane} lost its supervisor: {task.exception()!r}")
        self._own_group.check_health()
        self.engine.check_health()
        if self.engine.is_serving:
            return
        broken_s = time.monotonic() - max(self._started_at, self.engine.last_result_at)
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
        """Lease a replica of `stage`, and another when the lease ends.

        Leases are taken in the order of the stages: lanes that each held what another waits for would wait for ever.
        """
        while True:
            await self._until(lambda: self._earlier_leased(stage))
            lease = asyncio.create_task(self._lease(stage, handle))
            lost = asyncio.create_task(self._until_earlier_lost(stage))
            try:
                await asyncio.wait({lease, lost}, return_when=asyncio.FIRST_COMPLETED)
                given_back = f"given back, as an earlier stage was lost for {LEASE_PATIENCE_S:g} s"
                reason, pause_s = lease.result() if lease.done() else (given_back, 0.0)
            finally:
                lost.cancel()
                lease.cancel()
                await asyncio.wait({lease})
            self._leased.discard(stage)
            logger.warning("lane %s: stage %d: %s", self._lane, stage, reason)
            self._set_state(stage, GroupState(-1, reason=reason))
            await asyncio.sleep(pause_s)

    async def _lease(self, stage: int, handle: DeploymentHandle[Any]) -> tuple[str, float]:
        """Hold one lease; returns why it ended, and seconds until the next may be asked for."""
        leader = ray.get_runtime_context().current_actor
        stream = handle.options(stream=True).lease.remote(leader, self._lane, self._fingerprint)
        try:
            async for state in stream:
                self._leased.add(stage)
                self._set_state(stage, state)
            return "the lease ended", RETRY_PAUSE_S
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except LeaseRefused as error:
            refusal = getattr(error, "cause", error)  # Ray's wrapper has a traceback
            return f"the lease was refused: {refusal}", REFUSED_PAUSE_S
        except Exception as error:  # whatever broke the lease, another is needed
            return f"the lease broke: {type(error).__name__}", RETRY_PAUSE_S

    def _earlier_leased(self, stage: int) -> bool:
        return all(earlier in self._leased for earlier in range(1, stage))

    async def _until_earlier_lost(self, stage: int) -> None:
        """Until a stage before `stage` has not been leased for LEASE_PATIENCE_S."""
        while True:
            await self._until(lambda: not self._earlier_leased(stage))
            try:
                await asyncio.wait_for(self._until(lambda: self._earlier_leased(stage)), LEASE_PATIENCE_S)
            except TimeoutError:
                return

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
            self._epoch = await self._next_epoch(workers)
            runs: dict[Rank, asyncio.Task[None]] = {}
            try:
                with timed(f"lane {self._lane}", f"rendezvous of epoch {self._epoch}"):
                    runs = await start_epoch(self._config, self._context, self.engine, self._epoch, workers, num_blocks)
                self.num_blocks = num_blocks
                self._serving.set()
                reason = await self._until_broken(states, runs)
            except PhaseError as error:
                reason = str(error)
                await self._kill_silent(workers)
            self._last_error = reason
            self._serving.clear()
            logger.warning("lane %s: epoch %d is over: %s", self._lane, self._epoch, reason)
            await asyncio.wrap_future(self.engine.detach("healing"))
            await self._stop(workers, runs)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _next_epoch(self, workers: dict[Rank, Any]) -> int:
        """Above those that the workers were in, whatever the clocks of the leaders that began them."""
        seen = [state.epoch for state in (await progress(workers)).values() if state is not None]
        return new_epoch(max(self._epoch, *seen))

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
        for worker in workers.values():
            worker.stop.remote(self._epoch)
        if not runs:
            return
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

    async def _kill_silent(self, workers: dict[Rank, Any]) -> None:
        """After a failed start: the next one would wait for ranks that do not answer until its deadline too."""
        for rank, state in (await progress(workers)).items():
            if state is None:
                logger.error("lane %s: stage %d rank %d does not answer, killed", self._lane, *rank)
                ray.kill(workers[rank])

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _waiting_for(self) -> str:
        down = [f"stage {i} ({s.reason})" for i, s in enumerate(self._states) if not s.is_up]
        return ", ".join(down) or self._last_error or "the rendezvous"

"""A lane of Ray actors for a script, without Ray Serve and without healing."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
import zmq
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.rendezvous import progress, start_epoch
from stagemesh.deployments.lane.worker_group import WorkerGroup, rank_resources, workers_by_rank
from stagemesh.stages.engine.engine import Engine, TokenSink
from stagemesh.stages.engine.epoch import StepRaised
from stagemesh.stages.engine.lane import Lane
from stagemesh.stages.messages.request import EngineRequest, RequestSummary
from stagemesh.stages.messages.wiring import Rank, new_epoch

logger = logging.getLogger(__name__)

AFTERMATH_S = 1.0
"""For other ranks to fail too: the first error may be an effect."""
Result = TypeVar("Result")


class RayLane(Lane):
    """Uses the caller's Ray instance, else its own. Calls `on_failure(reason)` from one of its own threads, and
    `on_phase(name)` as `start` begins each phase."""

    def __init__(
        self,
        config: EngineConfig,
        sink: TokenSink,
        on_failure: Callable[[str], None],
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._on_failure = on_failure
        self._on_phase = on_phase
        self._owns_ray = False
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._placements: list[PlacementGroup] = []
        self._groups: list[WorkerGroup] = []
        self._workers: dict[Rank, Any] = {}
        self._watching: asyncio.Task[None] | None = None
        self.num_blocks = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lane", daemon=True)
        self._thread.start()
        self.engine = Engine(config, "offline", sink, self._step_failed)

    def start(self) -> None:
        """Raises PhaseError."""
        try:
            if not ray.is_initialized():
                self._owns_ray = True
                ray.init(log_to_driver=False)
            self._call(self._start())
        except BaseException:
            self.close()
            raise

    def generate(self, request: EngineRequest) -> Future[RequestSummary]:
        return self.engine.generate(request)

    def abort(self, request_id: str) -> Future[None]:
        return self.engine.abort(request_id)

    def close(self) -> None:
        """Also ends the placement groups, and Ray if `start` began it."""
        if self._closed:
            return
        self._closed = True
        self.engine.close()
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._context.term()
        if self._owns_ray:
            ray.shutdown()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` in the lane's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- in the lane's event loop ------------------------------------------------------------------------

    async def _start(self) -> None:
        plan = self._config.plan
        for stage in range(plan.pp_size):
            bundles = [rank_resources(self._config)] * plan.tp_size
            self._placements.append(placement_group(bundles, strategy="STRICT_PACK"))
            self._groups.append(WorkerGroup(self._config, stage, self._placements[-1]))
        self._on_phase("weights")
        await asyncio.gather(*(group.start() for group in self._groups))
        self._on_phase("KV cache")
        states = [await anext(group.states()) for group in self._groups]
        if down := [state.reason for state in states if not state.is_up]:
            raise RuntimeError("; ".join(down))
        self._workers = workers_by_rank(states)
        self.num_blocks = min(state.num_blocks for state in states)
        runs = await start_epoch(self._config, self._context, self.engine, new_epoch(), self._workers, self.num_blocks)
        self._watching = asyncio.create_task(self._watch(runs))  # asyncio holds tasks weakly

    async def _watch(self, runs: dict[Rank, asyncio.Task[None]]) -> None:
        """Wait until a rank leaves its run loop, as none should."""
        await asyncio.wait(runs.values(), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(runs.values(), timeout=AFTERMATH_S)
        failed = {rank: error for rank, run in runs.items() if run.done() and (error := run.exception()) is not None}
        for run in runs.values():
            run.cancel()
        if failed and not self._closed:
            self._close_groups()
            self.engine.detach("failed")
            self._on_failure(root_cause(failed))

    def _step_failed(self, epoch: int, error: Exception) -> None:
        """Called in the engine's thread."""
        if not self._closed:
            asyncio.run_coroutine_threadsafe(self._report(error), self._loop)

    async def _report(self, error: Exception) -> None:
        """Fail with the error and what every rank is doing. One that a rank has sent names the rank itself."""
        if isinstance(error, StepRaised):
            return self._on_failure(str(error))
        reasons = [f"{type(error).__name__}: {error}"]
        for (stage, tp_rank), state in (await progress(self._workers)).items():
            rank = f"stage {stage} rank {tp_rank}"
            if state is None:
                reasons.append(f"{rank} does not answer")
            elif state.phase != "idle":
                reasons.append(f"{rank} in '{state.phase}' for {state.seconds:.1f} s")
        self._on_failure("; ".join(reasons))

    async def _stop(self) -> None:
        self._close_groups()
        for placement in self._placements:
            remove_placement_group(placement)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _close_groups(self) -> None:
        for group in self._groups:
            group.close()


def root_cause(failed: dict[Rank, BaseException]) -> str:
    """The errors as text, without those that only lost a peer unless all did."""
    from stagemesh.stages.layers.tensor_parallel import PeerLost

    # Ray wraps the error: the original has the short message, the wrapper a traceback.
    errors = {rank: getattr(error, "cause", None) or error for rank, error in sorted(failed.items())}
    causes = {rank: error for rank, error in errors.items() if not isinstance(error, PeerLost)} or errors
    return "; ".join(
        f"stage {stage} rank {tp_rank}: {type(error).__name__}: {str(error)[-300:]}"
        for (stage, tp_rank), error in causes.items()
    )

"""The Leader deployment: stage 0 of a lane, with the lane's engine and its wiring."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
import zmq
from ray import serve
from ray.serve.handle import DeploymentHandle

from stagemesh.config.capacity import capacity_line
from stagemesh.config.engine import EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.lane.rendezvous import timed
from stagemesh.deployments.lane.supervisor import Lane
from stagemesh.deployments.lane.worker_group import WorkerGroup
from stagemesh.stages.engine.engine import Engine
from stagemesh.stages.messages.channel import RouterLinks
from stagemesh.stages.messages.request import EngineRequest, RequestSummary

logger = logging.getLogger("ray.serve")

WARM_UP_TOKENS = 8


class Leader:
    """One replica is one lane: it leases a replica of every later stage, wires them, and runs the engine."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, *later_stages: DeploymentHandle[Any]
    ) -> None:
        self._config = config
        self._lane_id = serve.get_replica_context().replica_id.unique_id
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links = RouterLinks(self._context, ray.util.get_node_ip_address(), self._lane_id)
        self._group = WorkerGroup(config, 0)
        self._lane: Lane | None = None
        loop = asyncio.get_running_loop()

        def on_failure(epoch: int, reason: str) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self._step_failed, epoch, reason)

        self._engine = Engine(config, self._lane_id, self._links, on_failure)
        try:
            await self._group.start()
            self._lane = Lane(config, self._lane_id, self._context, self._group, list(later_stages), self._engine)
            await self._lane.start()
            await self._warm_up()
            logger.info(
                "lane %s: %s",
                self._lane_id,
                capacity_line(
                    config.device,
                    self._lane.num_blocks * config.block_size,
                    config.max_model_len,
                ),
            )
        except BaseException:
            self._close()
            raise

    def _step_failed(self, epoch: int, reason: str) -> None:
        if self._lane is not None:
            self._lane.step_failed(epoch, reason)

    async def _warm_up(self) -> None:
        """Generate through the whole lane once: a replica that reports ready has generated."""
        limit = min(WARM_UP_TOKENS, self._config.max_model_len - 2)
        params = SamplingParams(max_tokens=2, temperature=0.0, seed=0, ignore_eos=True)
        done = self._engine.generate(EngineRequest("warm-up", [0] * limit, params))
        timeout_s = self._config.startup_timeout_s
        try:
            with timed(f"lane {self._lane_id}", "warm-up"):
                await asyncio.wait_for(asyncio.wrap_future(done), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"lane {self._lane_id}: phase 'warm-up' took over {timeout_s:g} s") from None

    async def generate(self, request: EngineRequest) -> RequestSummary:
        """Run one request to its end. Tokens go to `request.reply_to`; cancelling this call aborts it."""
        try:
            return await asyncio.wrap_future(self._engine.generate(request))
        except asyncio.CancelledError:
            self._engine.abort(request.request_id)
            raise
        except ConfigError as error:
            return RequestSummary(request.request_id, 0, "refused", str(error))

    async def lane_id(self) -> str:
        """A call with no effect: whoever makes it learns that a lane is up."""
        return self._lane_id

    def record_replica_metadata(self) -> dict[str, str]:
        """For the routers: where this lane publishes its stats (Serve hands it to every handle)."""
        return {"lane": self._lane_id, "stats": self._links.stats_address}

    async def check_health(self) -> None:
        """Serve replaces a leader whose lane could not be made whole again in time."""
        if self._lane is not None:
            self._lane.check_health()

    def _close(self) -> None:
        if self._lane is not None:
            self._lane.close()
        self._engine.close()
        self._group.close()
        self._links.close()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._close()

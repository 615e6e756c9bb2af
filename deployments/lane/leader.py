"""The Leader deployment: stage 0 of a lane, and its verbs."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
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
from stagemesh.deployments.lane.supervisor import LaneSupervisor
from stagemesh.deployments.lane.worker_group import WorkerGroup
from stagemesh.stages.engine.grammar import Grammar
from stagemesh.stages.messages.channel import RouterLinks
from stagemesh.stages.messages.request import EngineRequest, RequestSummary

logger = logging.getLogger("ray.serve")

WARM_UP_TOKENS = 8
GRAMMAR_TIMEOUT_S = 30.0
"""Of a request's grammar, waiting for the others included."""


class Leader:
    """One replica is one lane, with the verbs of `stages.engine.lane.Lane` as coroutines."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, *later_stages: DeploymentHandle[Any]
    ) -> None:
        self._config = config
        self._lane_id = serve.get_replica_context().replica_id.unique_id
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links = RouterLinks(self._context, ray.util.get_node_ip_address(), self._lane_id)
        self._grammar_threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._group = WorkerGroup(config, 0)
        self._lane = LaneSupervisor(config, self._lane_id, self._context, self._group, later_stages, self._links)
        await self.start()

    async def start(self) -> None:
        """A replica that is ready has generated once."""
        try:
            await self._lane.start()
            await self._warm_up()
        except BaseException:
            self.close()
            raise
        num_tokens = self._lane.num_blocks * self._config.block_size
        capacity = capacity_line(self._config.device, num_tokens, self._config.max_model_len)
        logger.info("lane %s: %s", self._lane_id, capacity)

    async def generate(self, request: EngineRequest) -> RequestSummary:
        """Tokens go to `request.reply_to`; cancelling this call aborts the request."""
        try:
            grammar = await self._make_grammar(request)
            return await asyncio.wrap_future(self._lane.engine.generate(request, grammar))
        except asyncio.CancelledError:
            self.abort(request.request_id)
            raise
        except ConfigError as error:
            return RequestSummary(request.request_id, 0, "refused", str(error))

    async def _make_grammar(self, request: EngineRequest) -> Grammar | None:
        """Beside the event loop, which running requests need."""
        if request.params.structured_outputs is None:
            return None
        make = self._lane.engine.make_grammar
        making = asyncio.get_running_loop().run_in_executor(self._grammar_threads, make, request.params)
        try:
            return await asyncio.wait_for(making, GRAMMAR_TIMEOUT_S)
        except TimeoutError:
            reason = f"its grammar was not ready within {GRAMMAR_TIMEOUT_S:g} s"
            raise ConfigError("structured_outputs", "…", reason) from None

    def abort(self, request_id: str) -> None:
        self._lane.engine.abort(request_id)

    def close(self) -> None:
        self._grammar_threads.shutdown(wait=False, cancel_futures=True)
        self._lane.close()
        self._group.close()
        self._links.close()

    async def lane_id(self) -> str:
        """No effect: a reply says that a lane is up."""
        return self._lane_id

    def record_replica_metadata(self) -> dict[str, str]:
        """Where routers get this lane's stats."""
        return {"lane": self._lane_id, "stats": self._links.stats_address}

    async def check_health(self) -> None:
        """Serve replaces a leader whose lane has not healed in time."""
        self._lane.check_health()

    async def _warm_up(self) -> None:
        limit = min(WARM_UP_TOKENS, self._config.max_model_len - 2)
        params = SamplingParams(max_tokens=2, temperature=0.0, seed=0, ignore_eos=True)
        done = self._lane.engine.generate(EngineRequest("warm-up", [0] * limit, params))
        timeout_s = self._config.startup_timeout_s
        try:
            with timed(f"lane {self._lane_id}", "warm-up"):
                await asyncio.wait_for(asyncio.wrap_future(done), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"lane {self._lane_id}: phase 'warm-up' took over {timeout_s:g} s") from None

    def __del__(self) -> None:
        if hasattr(self, "_lane"):
            self.close()

"""From a router to the lanes: one lifetime call per request over Serve, tokens over ZeroMQ."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import ray
import zmq
import zmq.asyncio
from ray.serve.exceptions import RequestCancelledError
from ray.serve.handle import DeploymentHandle

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.lane_view import LaneView
from stagemesh.stages.messages.channel import bind_random_port
from stagemesh.stages.messages.request import (
    EngineRequest,
    LaneError,
    LaneStats,
    RequestSummary,
    TokenBatch,
    TokenDelta,
)

logger = logging.getLogger("ray.serve")

Arrived = TokenDelta | LaneError | None
"""Tokens, the reason why there will be none, or (None) the end of the lifetime call."""
LAST_TOKENS_TIMEOUT_S = 5.0
"""How long tokens may arrive after the lifetime call has returned."""


class RayLaneClient:
    """A `LaneClient` over Ray Serve. One per router replica."""

    def __init__(self, leaders: DeploymentHandle[Any], view: LaneView, lane_timeout_s: float) -> None:
        """lane_timeout_s: for some lane to take a request."""
        self._leaders = leaders
        self._lane_timeout_s = lane_timeout_s
        self._view = view
        self._queues: dict[str, asyncio.Queue[Arrived]] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._address = bind_random_port(self._socket, ray.util.get_node_ip_address())
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Call it in the event loop that serves requests."""
        self._view.start()
        self._keep(asyncio.create_task(self._receive()))
        # A handle learns of its replicas with its first call.
        self._keep(asyncio.create_task(self._first_call()))

    def lane_stats(self) -> list[LaneStats]:
        return self._view.lane_stats()

    def ready(self) -> bool:
        return any(stats.state == "serving" for stats in self.lane_stats())

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Closing the iterator aborts the request on its lane."""
        request_id = request.request_id
        request = msgspec.structs.replace(request, reply_to=self._address)
        queue: asyncio.Queue[Arrived] = asyncio.Queue()
        self._queues[request_id] = queue
        # In a context of its own: calls made from one HTTP request share its id, by which Serve tells requests
        # that wait for a replica apart, so all but the last would wait for ever.
        response = contextvars.Context().run(self._leaders.generate.remote, request)
        ended = asyncio.ensure_future(response)
        ended.add_done_callback(lambda _: queue.put_nowait(None))
        self._keep(ended)

        def check_lane() -> None:
            if self._view.explain(request_id) is None:
                reason = f"no lane could take the request within {self._lane_timeout_s:g} s"
                queue.put_nowait(LaneError("unavailable", reason))

        timer = asyncio.get_running_loop().call_later(self._lane_timeout_s, check_lane)
        finished = False
        try:
            while not finished:
                arrived = await queue.get()
                if isinstance(arrived, LaneError):
                    raise arrived
                delta = arrived or await self._late_delta(ended, queue)
                finished = delta.finish_reason is not None
                yield delta
        finally:
            timer.cancel()
            self._queues.pop(request_id, None)
            self._view.finished(request_id)
            if not finished and not ended.done():
                response.cancel()

    async def _late_delta(self, ended: asyncio.Future[RequestSummary], queue: asyncio.Queue[Arrived]) -> TokenDelta:
        """Its call ended before the last token came. Raises LaneError, ConfigError for a refused request."""
        error = ended.exception()
        if error is not None:
            raise LaneError("lost", f"the lane running this request was lost ({type(error).__name__})") from error
        summary = ended.result()
        if summary.finish_reason == "refused":
            raise ConfigError("", None, summary.error)
        try:
            delta = await asyncio.wait_for(queue.get(), LAST_TOKENS_TIMEOUT_S)
        except TimeoutError:
            delta = None
        if not isinstance(delta, TokenDelta):
            raise LaneError(
                "internal", f"the last of {summary.num_tokens} tokens did not come in {LAST_TOKENS_TIMEOUT_S:g} s"
            )
        queue.put_nowait(None)  # more may be on its way
        return delta

    async def _receive(self) -> None:
        decode = msgspec.msgpack.Decoder(TokenBatch).decode
        while True:
            batch = decode(await self._socket.recv())
            for delta in batch.deltas:
                queue = self._queues.get(delta.request_id)
                if queue is not None:
                    queue.put_nowait(delta)

    async def _first_call(self) -> None:
        lane = await self._leaders.lane_id.remote()
        logger.info("first lane found: %s", lane)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """asyncio holds tasks weakly; a failure that nobody awaits must still be logged."""
        self._tasks.add(task)
        task.add_done_callback(self._dropped)

    def _dropped(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, RequestCancelledError):  # our own doing: the client has left
            logger.warning("%s: %s", type(error).__name__, str(error).splitlines()[-1:])

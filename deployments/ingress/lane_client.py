"""From a router to the lanes: one lifetime call per request over Serve, tokens over ZeroMQ.

A request outlives its lane. When the lane dies, drains or falls silent, the router sends prompt and answer so far to
another one, or waits for the next: the client sees a pause. What the old one may still send carries an older attempt
and is dropped.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import ray
import zmq.asyncio
from ray.serve.exceptions import RequestCancelledError
from ray.serve.handle import DeploymentHandle

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.lane_view import LaneView
from stagemesh.deployments.ingress.lanes import LaneClientCounts
from stagemesh.deployments.ingress.token_inbox import LaneLost, TokenInbox, TokenReader
from stagemesh.stages.messages.request import EngineRequest, LaneError, LaneStats, RequestSummary, TokenDelta

logger = logging.getLogger("ray.serve")

LAST_TOKENS_TIMEOUT_S = 2.0
"""How long tokens may arrive after the lifetime call has returned."""
MAX_LOSSES = 8
"""A request that lost so many lanes in a row without a new token ends with an error."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
"""Before the attempt after the second loss in a row; then twice as long each time."""
WATCH_PERIOD_S = 0.5
"""Between looks for lanes that are silent or drain."""


class _Attempt:
    """One sending of a request to the lane that Serve's request router chooses."""

    def __init__(self, response: Any, reader: TokenReader) -> None:
        self._response = response
        self._reader = reader
        self.is_finished = False
        """Its last tokens have come."""
        self.call: asyncio.Future[RequestSummary] = asyncio.ensure_future(response)
        self.call.add_done_callback(lambda _: reader.end(None))

    async def next_delta(self) -> TokenDelta:
        """Raises LaneLost; ConfigError for a refused request; LaneError where another lane would not help."""
        delta = await self._reader.get()
        if delta is None:
            delta = await self._late_delta()
            self._reader.end(None)  # more may be on its way
        if delta.finish_reason == "abort":
            raise LaneLost(delta.error or "the lane gave the request up")
        self.is_finished = delta.finish_reason is not None
        return delta

    async def _late_delta(self) -> TokenDelta:
        """The call ended before the last token came."""
        error = self.call.exception()
        if error is not None:
            raise LaneLost(f"the call to its lane failed: {type(error).__name__}")
        summary = self.call.result()
        if summary.finish_reason == "refused":
            raise ConfigError("", None, summary.error)
        try:
            delta = await asyncio.wait_for(self._reader.get(), LAST_TOKENS_TIMEOUT_S)
        except TimeoutError:
            delta = None
        if delta is None:
            reason = f"the last of {summary.num_tokens} tokens did not come within {LAST_TOKENS_TIMEOUT_S:g} s"
            raise LaneLost(f"the lane ended it ({summary.finish_reason}), and {reason}")
        return delta

    def close(self) -> None:
        if not self.is_finished and not self.call.done():
            self._response.cancel()


class RayLaneClient:
    """A `LaneClient` over Ray Serve. One per router replica."""

    def __init__(self, leaders: DeploymentHandle[Any], view: LaneView, lane_timeout_s: float) -> None:
        """lane_timeout_s: for some lane to take a request."""
        self._leaders = leaders
        self._lane_timeout_s = lane_timeout_s
        self._view = view
        self._context = zmq.asyncio.Context()
        self._inbox = TokenInbox(self._context, ray.util.get_node_ip_address())
        self._loops: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Future[Any]] = set()
        self._num_resumed = 0

    def start(self) -> None:
        """Call it in the event loop that serves requests."""
        self._view.start()
        self._loops = [asyncio.create_task(self._inbox.receive()), asyncio.create_task(self._watch())]
        # A handle learns of its replicas with its first call.
        self._keep(asyncio.create_task(self._first_call()))

    def check_health(self) -> None:
        """Raises RuntimeError if tokens or reports no longer arrive: this process can answer nobody."""
        for loop in self._loops + self._view.loops:
            if loop.done():
                error = None if loop.cancelled() else loop.exception()
                raise RuntimeError(f"a receive loop of this router has ended: {error!r}")

    def close(self) -> None:
        """End the loops, free the sockets."""
        for loop in self._loops:
            loop.cancel()
        self._view.close()
        self._context.destroy(linger=0)

    def lane_stats(self) -> list[LaneStats]:
        return self._view.lane_stats()

    def counts(self) -> LaneClientCounts:
        return LaneClientCounts(self._num_resumed, self._inbox.num_dropped)

    def ready(self) -> bool:
        are_running = not any(loop.done() for loop in self._loops)
        return are_running and any(stats.state == "serving" for stats in self.lane_stats())

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Closing the iterator aborts the request on its lane."""
        token_ids = list(request.output_token_ids)
        num_losses = 0
        while True:
            request = msgspec.structs.replace(request, reply_to=self._inbox.address, output_token_ids=list(token_ids))
            try:
                with self._sent(request) as attempt:
                    while not attempt.is_finished:
                        delta = await attempt.next_delta()
                        token_ids += delta.token_ids
                        num_losses = 0
                        yield delta
                return
            except LaneLost as error:
                num_losses += 1
                who = f"request {request.request_id}, attempt {request.attempt}"
                logger.warning("%s lost its lane after %d tokens: %s", who, len(token_ids), error)
                if num_losses > MAX_LOSSES:
                    raise LaneError("lost", f"the request lost {num_losses} lanes in a row: {error}") from error
            if num_losses > 1:
                await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (num_losses - 2), MAX_PAUSE_S))
            request = msgspec.structs.replace(request, attempt=request.attempt + 1)
            self._num_resumed += 1

    @contextmanager
    def _sent(self, request: EngineRequest) -> Iterator[_Attempt]:
        """One attempt. Given up where it has not finished."""
        request_id = request.request_id
        reader = self._inbox.open(request_id, request.attempt, len(request.output_token_ids))
        # In a context of its own: calls made from one HTTP request share its id, by which Serve tells requests
        # that wait for a replica apart, so all but the last would wait for ever.
        attempt = _Attempt(contextvars.Context().run(self._leaders.generate.remote, request), reader)
        self._keep(attempt.call)

        def check_lane() -> None:
            if self._view.explain(request_id) is None:
                reason = f"no lane could take the request within {self._lane_timeout_s:g} s"
                reader.end(LaneError("unavailable", reason))

        timer = asyncio.get_running_loop().call_later(self._lane_timeout_s, check_lane)
        try:
            yield attempt
        except LaneLost:
            self._view.distrust(reader.lane or self._view.lane_of(request_id))
            raise
        finally:
            timer.cancel()
            self._inbox.close(request_id)
            self._view.finished(request_id)
            attempt.close()

    async def _watch(self) -> None:
        """Takes requests from lanes that are silent or drain, where another lane can have them."""
        loop = asyncio.get_running_loop()
        looked_at = loop.time()
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            was_late = loop.time() - looked_at > 2 * WATCH_PERIOD_S
            looked_at = loop.time()
            if was_late:
                continue  # it was this process that was silent: the reports wait to be read
            self._view.notice_silence()
            for request_id, reader in list(self._inbox.readers.items()):
                lane = reader.lane or self._view.lane_of(request_id)
                if lane is not None and (reason := self._view.why_leave(lane)) is not None:
                    reader.end(LaneLost(reason))

    async def _first_call(self) -> None:
        lane = await self._leaders.lane_id.remote()
        logger.info("first lane found: %s", lane)

    def _keep(self, call: asyncio.Future[Any]) -> None:
        """asyncio holds tasks weakly; a failure that nobody awaits must still be logged."""
        self._calls.add(call)
        call.add_done_callback(self._dropped)

    def _dropped(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if call.cancelled() or (error := call.exception()) is None:
            return
        if not isinstance(error, RequestCancelledError):  # our own doing: the client has left
            logger.warning("%s: %s", type(error).__name__, str(error).splitlines()[-1:])

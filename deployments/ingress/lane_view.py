"""What a router process knows about the lanes: which run, their load, where requests went.

Serve's long poll brings the running leaders (through `LaneRouter`), whose replica metadata has the ZeroMQ address of
their stats; the router adds the requests it has sent since.
"""

from __future__ import annotations

import asyncio
import threading
import time

import msgspec
import zmq
import zmq.asyncio

from stagemesh.router.lane_chooser import LaneChoice, LaneChooser, NoLane
from stagemesh.router.load import MAX_OPEN_REQUESTS
from stagemesh.stages.messages.request import EngineRequest, LaneStats

STALE_AFTER_S = 5.0
"""Leaders publish every second, even when idle."""


class LaneView:
    """Thread-safe: Serve routes in a thread of its own, stats arrive in the replica's event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chooser = LaneChooser()
        self._addresses: dict[str, str] = {}
        self._stats: dict[str, tuple[LaneStats, float]] = {}
        """With the time.monotonic() of their arrival."""
        self._choices: dict[str, LaneChoice] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, asyncio.Task[None]] = {}
        self._context = zmq.asyncio.Context()

    def start(self) -> None:
        """Subscribe to stats, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._listen()

    def set_lanes(self, addresses: dict[str, str]) -> None:
        """addresses: of the running leaders' stats, by lane id."""
        with self._lock:
            self._addresses = dict(addresses)
            self._stats = {lane: stats for lane, stats in self._stats.items() if lane in addresses}
            self._chooser.set_lanes(sorted(addresses))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._listen)

    def choose(self, request: EngineRequest) -> list[str]:
        """Lane ids, best first; empty if no lane is known."""
        with self._lock:
            try:
                choice = self._chooser.choose(request.request_id, request.prompt_token_ids)
            except NoLane:
                return []
            self._choices[request.request_id] = choice
            if len(self._choices) > MAX_OPEN_REQUESTS:
                # Serve may choose for a request just after its client has left: `finished` never comes for it.
                del self._choices[next(iter(self._choices))]
        return [choice.lane, *choice.fallbacks]

    def finished(self, request_id: str) -> None:
        """The request no longer counts as load that the stats do not show yet."""
        with self._lock:
            self._choices.pop(request_id, None)
            self._chooser.finished(request_id)

    def explain(self, request_id: str) -> LaneChoice | None:
        """Why a running request went to its lane."""
        with self._lock:
            return self._choices.get(request_id)

    def lane_stats(self) -> list[LaneStats]:
        """The latest of every lane that reported within STALE_AFTER_S."""
        now = time.monotonic()
        with self._lock:
            return [stats for stats, arrived in self._stats.values() if now - arrived < STALE_AFTER_S]

    def _listen(self) -> None:
        with self._lock:
            addresses = dict(self._addresses)
        for lane in [lane for lane in self._listeners if lane not in addresses]:
            self._listeners.pop(lane).cancel()
        for lane, address in addresses.items():
            if lane not in self._listeners:
                self._listeners[lane] = asyncio.create_task(self._follow(lane, address))

    async def _follow(self, lane: str, address: str) -> None:
        decode = msgspec.msgpack.Decoder(LaneStats).decode
        socket = self._context.socket(zmq.SUB)
        try:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(address)
            while True:
                stats = decode(await socket.recv())
                with self._lock:
                    if lane in self._addresses:
                        self._stats[lane] = stats, time.monotonic()
                        self._chooser.update(stats)
        finally:
            socket.close(linger=0)


VIEW = LaneView()
"""One per process: where Serve's request router and the Router meet."""

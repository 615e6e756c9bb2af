"""What a router process knows about the lanes: which run, their load, where requests went.

Serve's long poll brings the running leaders (through `LaneRouter`), whose replica metadata has the ZeroMQ address of
their stats; the router adds the requests it has sent since. A lane whose reports stop gets no requests until it reports
again.
"""

from __future__ import annotations

import asyncio
import threading
import time

import zmq
import zmq.asyncio

from stagemesh.router.lane_chooser import LaneChoice, LaneChooser, NoLane
from stagemesh.router.load import MAX_OPEN_REQUESTS
from stagemesh.stages.messages.decoding import MAX_MESSAGE_BYTES, MessageDecoder
from stagemesh.stages.messages.request import EngineRequest, LaneStats

SILENT_AFTER_S = 2.0
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

    def lane_of(self, request_id: str) -> str | None:
        choice = self.explain(request_id)
        return None if choice is None else choice.lane

    def lane_stats(self) -> list[LaneStats]:
        """The latest of every lane that is not silent."""
        with self._lock:
            return [stats for lane, (stats, _) in self._stats.items() if not self._is_silent(lane)]

    def knows(self, lane: str) -> bool:
        """Whether `choose` has an opinion on it."""
        with self._lock:
            return lane in self._addresses

    def notice_silence(self) -> None:
        """Call it a few times a second."""
        with self._lock:
            for lane in self._stats:
                if self._is_silent(lane):
                    self._chooser.silence(lane)

    def distrust(self, lane: str | None) -> None:
        """It lost a request: it gets no other before it has reported again."""
        with self._lock:
            if lane in self._addresses:
                self._chooser.silence(lane)

    def why_leave(self, lane: str) -> str | None:
        """Why a request should leave its lane for another one, which there is; None: it should not."""
        with self._lock:
            others = [stats for name, (stats, _) in self._stats.items() if name != lane and not self._is_silent(name)]
            if not any(stats.state == "serving" for stats in others):
                return None
            if lane not in self._addresses:
                return f"lane {lane} drains"
            return f"lane {lane} has been silent for {SILENT_AFTER_S:g} s" if self._is_silent(lane) else None

    def _is_silent(self, lane: str) -> bool:
        """A lane that has not reported yet is not; its start-up ends with a report."""
        return lane in self._stats and time.monotonic() - self._stats[lane][1] > SILENT_AFTER_S

    @property
    def loops(self) -> list[asyncio.Task[None]]:
        """They run for as long as their lane does."""
        return list(self._listeners.values())

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.cancel()
        self._context.destroy(linger=0)

    def _listen(self) -> None:
        with self._lock:
            addresses = dict(self._addresses)
        for lane in [lane for lane in self._listeners if lane not in addresses]:
            self._listeners.pop(lane).cancel()
        for lane, address in addresses.items():
            if lane not in self._listeners:
                self._listeners[lane] = asyncio.create_task(self._follow(lane, address))

    async def _follow(self, lane: str, address: str) -> None:
        decoder: MessageDecoder[LaneStats] = MessageDecoder(LaneStats, f"reports of lane {lane}")
        socket = self._context.socket(zmq.SUB)
        try:
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(address)
            while True:
                stats = decoder.decode(await socket.recv())
                with self._lock:
                    if stats is not None and stats.lane == lane and lane in self._addresses:
                        self._stats[lane] = stats, time.monotonic()
                        self._chooser.update(stats)
        finally:
            socket.close(linger=0)


VIEW = LaneView()
"""One per process: where Serve's request router and the Router meet."""

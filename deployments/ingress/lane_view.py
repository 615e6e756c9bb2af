"""What a router process knows about the lanes: who runs, how loaded they say they are, where requests went.

One per process. Serve's long poll brings the running leaders (through `LaneRouter`), each leader's own stats
come by ZeroMQ from the address in its replica metadata, and the router adds the requests it has sent since.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from stagemesh.router.lane_chooser import LaneChoice, LaneChooser, NoLane
from stagemesh.router.load import MAX_OPEN_REQUESTS
from stagemesh.stages.messages.request import EngineRequest, LaneStats

STALE_AFTER_S = 5.0
"""Leaders publish every second even when idle; one that has been silent for longer is not counted on."""


@dataclass(frozen=True)
class Heard:
    """Stats of a lane and when they came (monotonic seconds)."""

    stats: LaneStats
    at: float


class LaneView:
    """Thread-safe: Serve routes in a thread of its own, stats arrive in the replica's event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chooser = LaneChooser()
        self._addresses: dict[str, str] = {}
        self._heard: dict[str, Heard] = {}
        self._choices: dict[str, LaneChoice] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[str, asyncio.Task[None]] = {}
        self._context = zmq.asyncio.Context()

    def start(self) -> None:
        """Listen to stats in the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        self._listen()

    def set_lanes(self, addresses: dict[str, str]) -> None:
        """The leaders that run now, by lane id, with the address of their stats."""
        with self._lock:
            self._addresses = dict(addresses)
            for lane in [lane for lane in self._heard if lane not in addresses]:
                del self._heard[lane]
            self._chooser.set_lanes(sorted(addresses))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._listen)

    def choose(self, call: EngineRequest) -> list[str]:
        """Lane ids, best first, for this request; remembers the reason under its id. Empty: no lane is known."""
        with self._lock:
            try:
                choice = self._chooser.choose(call.request_id, call.prompt_token_ids)
            except NoLane:
                return []
            self._choices[call.request_id] = choice
            if len(self._choices) > MAX_OPEN_REQUESTS:
                # Serve may choose for a request just after its client has left: nobody takes that one back.
                del self._choices[next(iter(self._choices))]
        return [choice.lane, *choice.fallbacks]

    def finished(self, request_id: str) -> None:
        """The request is over: it no longer counts as load that the stats do not show yet."""
        with self._lock:
            self._choices.pop(request_id, None)
            self._chooser.finished(request_id)

    def explain(self, request_id: str) -> LaneChoice | None:
        """Why a running request went where it went."""
        with self._lock:
            return self._choices.get(request_id)

    def lane_stats(self) -> list[LaneStats]:
        """The latest word of every lane that has spoken lately."""
        now = time.monotonic()
        with self._lock:
            return [heard.stats for heard in self._heard.values() if now - heard.at < STALE_AFTER_S]

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
                        self._heard[lane] = Heard(stats, time.monotonic())
                        self._chooser.update(stats)
        finally:
            socket.close(linger=0)


VIEW = LaneView()
"""This process's view: Serve makes the request router by itself, so the two can only meet here."""

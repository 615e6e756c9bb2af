"""Tokens on their way from the engine's thread to the calls of an `LLM` that wait for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from stagemesh.stages.engine.engine import TokenSink
from stagemesh.stages.messages.request import LaneStats, TokenDelta


class LaneFailed(RuntimeError):
    """The lane can run no further step. The message names the rank and the cause."""


class Inbox(TokenSink):
    """Tokens on their way from the engine's thread to the calls that wait for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[str, queue.SimpleQueue[TokenDelta | Exception]] = {}
        self._failure: LaneFailed | None = None

    def open(self, call: str) -> queue.SimpleQueue[TokenDelta | Exception]:
        with self._lock:
            if self._failure is not None:
                raise LaneFailed(str(self._failure))
            return self._calls.setdefault(call, queue.SimpleQueue())

    def close(self, call: str) -> None:
        with self._lock:
            self._calls.pop(call, None)

    def fail(self, failure: LaneFailed) -> None:
        """The first failure is the one that every call gets: what follows from it is not news."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
                for arriving in self._calls.values():
                    arriving.put(failure)

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        arriving = self._calls.get(reply_to)
        if arriving is None:
            return False
        for delta in deltas:
            arriving.put(delta)
        return True

    def publish(self, stats: LaneStats) -> None:
        pass


def arrivals(arriving: queue.SimpleQueue[TokenDelta | Exception]) -> Iterator[TokenDelta]:
    while True:
        delta = arriving.get()
        if isinstance(delta, Exception):
            raise delta
        yield delta

"""From the engine's thread to the calls of an `LLM`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

from stagemesh.stages.engine.engine import TokenSink
from stagemesh.stages.messages.request import LaneStats, TokenDelta


class LaneFailed(RuntimeError):
    """Names the rank and the cause."""


class Inbox(TokenSink):
    """One queue per open call. Thread-safe."""

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
        """Every call, open or later, raises the first failure."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
                for queue_of_call in self._calls.values():
                    queue_of_call.put(failure)

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        queue_of_call = self._calls.get(reply_to)
        if queue_of_call is None:
            return False
        for delta in deltas:
            queue_of_call.put(delta)
        return True

    def publish(self, stats: LaneStats) -> None:
        pass

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        return set()  # `emit` says it


def deltas_of(queue_of_call: queue.SimpleQueue[TokenDelta | Exception]) -> Iterator[TokenDelta]:
    while True:
        delta = queue_of_call.get()
        if isinstance(delta, Exception):
            raise delta
        yield delta

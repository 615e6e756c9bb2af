"""The time that a request has, its time in queues included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from stagemesh.stages.messages.request import LaneError

ItemT = TypeVar("ItemT")


class Deadline:
    """Of one request; begins where it is made, in a running event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + timeout_s

    def timer(self) -> Timer:
        """For one of its choices."""
        error = LaneError("timeout", f"the request did not finish within timeout={self._timeout_s:g} s")
        return Timer(self._loop, self._end, error)


class Timer:
    """Ends a wait for an item, never what its reader does between two. One timer for all items: half a microsecond."""

    def __init__(self, loop: asyncio.AbstractEventLoop, end: float, error: LaneError) -> None:
        self._error = error
        self._is_over = False
        self._waiting: asyncio.Task[object] | None = None
        self._handle = loop.call_at(end, self._end)

    def close(self) -> None:
        self._handle.cancel()

    async def next(self, items: AsyncIterator[ItemT]) -> ItemT | None:
        """The next item; None after the last one. Raises LaneError, having cancelled `anext`, when the time is up."""
        if self._is_over:
            raise self._error
        task = self._waiting = asyncio.current_task()
        assert task is not None
        try:
            return await anext(items, None)
        except asyncio.CancelledError:
            if self._is_over and task.uncancel() == 0:  # else somebody else cancels it too
                raise self._error from None
            raise
        finally:
            self._waiting = None

    def _end(self) -> None:
        self._is_over = True
        if self._waiting is not None:
            self._waiting.cancel()

"""The time that a request has, its time in queues included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from stagemesh.stages.messages.request import LaneError

ItemT = TypeVar("ItemT")


class Deadline:
    """Begins where it is made, in a running event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + timeout_s

    async def next(self, items: AsyncIterator[ItemT]) -> ItemT | None:
        """The next item; None after the last one.

        Raises LaneError, and has then cancelled `anext`, when the time is up.
        """
        # Around each wait, not around the loop: a generator must not be cancelled where its reader waits.
        if self._loop.time() < self._end:
            timeout = asyncio.timeout_at(self._end)
            try:
                async with timeout:
                    return await anext(items, None)
            except TimeoutError:
                if not timeout.expired():
                    raise
        raise LaneError("timeout", f"the request did not finish within timeout={self._timeout_s:g} s")

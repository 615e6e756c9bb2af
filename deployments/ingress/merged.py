"""The streams of a request's choices as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from stagemesh.deployments.ingress.lanes import MAX_UNREAD_DELTAS
from stagemesh.stages.messages.request import LaneError
from stagemesh.stages.text.output import TextDelta


async def merged(streams: Sequence[AsyncGenerator[TextDelta, None]]) -> AsyncGenerator[TextDelta, None]:
    """All streams interleaved. The first error ends all; closing this closes them.

    Raises LaneError when too many wait to be taken.
    """
    queue: asyncio.Queue[TextDelta | Exception | None] = asyncio.Queue()
    most = MAX_UNREAD_DELTAS * (1 + len(streams) // 256)  # each step of a lane brings one for every stream

    async def drain(stream: AsyncGenerator[TextDelta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    if queue.qsize() >= most:
                        raise LaneError("overloaded", f"{most} pieces of the answer were not read")
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

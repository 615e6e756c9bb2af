"""One client's connection while its response is computed: left, quiet, or not read."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

KEEP_ALIVE_S = 15.0
"""Without a write, until `keep_alive` is written. Proxies on the way often give up after 30 or 60 s."""
SLOW_READER_S = 30.0
"""For one write, until the client is cut off. Until then at most 64 KiB wait in uvicorn (asyncio's high-water mark) and
two buffers of 16 KiB in HAProxy, beside what the kernel holds.

Serve calls this code in a thread of its own and takes writes at once, without a bound; there HAProxy cuts the client
off (its `timeout client` in the YAML), and what can pile up until then is the text of half a minute."""
SETTLE_TURNS = 8
"""Turns of the event loop in which a request may fail with a status of its own: what needs no waiting does."""


class Connection:
    """Writes of one streamed response, whose head comes by itself."""

    is_started = False
    """Whether the head was sent."""

    def __init__(self, send: Send, head: Message) -> None:
        self._send = send
        self._head = head
        self._loop = asyncio.get_running_loop()
        self._num_writing = 0
        self._since = self._loop.time()  # the start of the write that waits, else the end of the last one

    async def send(self, message: Message) -> None:
        """Raises ClientDisconnect."""
        if not self._num_writing:
            self._since = self._loop.time()
        self._num_writing += 1
        try:
            await self._send(message)
        except OSError as error:  # ASGI's sign for a closed connection
            raise ClientDisconnect from error
        finally:
            self._num_writing -= 1
            self._since = self._loop.time()

    async def start(self) -> None:
        if not self.is_started:
            self.is_started = True
            await self.send(self._head)

    async def body(self, body: bytes, *, more: bool = True) -> None:
        if not self.is_started:
            await self.start()
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def watch(self, keep_alive: bytes) -> None:
        """Start the response, write `keep_alive` where nothing comes; return when the client does not read."""
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)
        await self.start()
        while True:
            limit = SLOW_READER_S if self._num_writing else KEEP_ALIVE_S
            left = self._since + limit - self._loop.time()
            if left > 0:
                await asyncio.sleep(left)
            elif self._num_writing:
                return
            else:
                try:
                    async with asyncio.timeout(SLOW_READER_S):
                        await self.body(keep_alive)
                except TimeoutError:
                    return


class AbortableResponse(Response):
    """Computed while it is sent, and cancelled as soon as the client leaves or does not read.

    With ASGI 2.4, Starlette's StreamingResponse notices that only by its next write: too late for a queued sequence.
    """

    keep_alive: bytes | None = None
    """For streams; the others do not wait for their client, one write hands them over."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        connection = Connection(send, head)
        others = [_until_disconnect(receive)]
        if self.keep_alive is not None:
            others.append(connection.watch(self.keep_alive))
        with suppress(ClientDisconnect):  # nobody is there to read it
            await _work_until(self._run(scope, receive, connection), others)

    async def _run(self, scope: Scope, receive: Receive, connection: Connection) -> None:
        raise NotImplementedError


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _work_until(work: Coroutine[Any, Any, None], others: list[Coroutine[Any, Any, None]]) -> None:
    """Run `work`; cancel it when one of the others ends or this call is cancelled."""
    working = asyncio.create_task(work)
    tasks = [working, *map(asyncio.create_task, others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if not working.cancelled():
        working.result()

"""Tokens of all requests of a router, from the one socket to which leaders send them."""

from __future__ import annotations

import asyncio
import logging

import zmq
import zmq.asyncio

from stagemesh.deployments.ingress.lanes import MAX_UNREAD_DELTAS
from stagemesh.stages.messages.channel import bind_random_port
from stagemesh.stages.messages.decoding import MessageDecoder
from stagemesh.stages.messages.request import LaneError, TokenBatch, TokenDelta

logger = logging.getLogger("ray.serve")


class LaneLost(RuntimeError):
    """The lane of a request can no longer answer it; another one can."""


class TokenReader:
    """The tokens of one attempt, in order. LaneError "overloaded" comes behind MAX_UNREAD_DELTAS unread ones."""

    def __init__(self, attempt: int, offset: int) -> None:
        """offset: tokens of the answer that earlier attempts brought."""
        self.attempt = attempt
        self.lane: str | None = None
        """Known with its first tokens."""
        self._next_offset = offset
        self._is_full = False
        self._arrived: asyncio.Queue[TokenDelta | Exception | None] = asyncio.Queue()

    def put(self, lane: str, delta: TokenDelta) -> None:
        self.lane = lane
        num_unread = self._arrived.qsize()
        if num_unread < MAX_UNREAD_DELTAS:
            self._arrived.put_nowait(delta)
        elif not self._is_full:
            self._is_full = True
            self.end(LaneError("overloaded", f"{num_unread} pieces of the answer were not read"))

    def end(self, reason: LaneLost | LaneError | None) -> None:
        """Raised by `get` behind what has come; None: nothing more will be sent, though tokens may be on their way."""
        self._arrived.put_nowait(reason)

    async def get(self) -> TokenDelta | None:
        """The next tokens; None where `end` was told no reason. LaneLost: some are missing."""
        arrived = await self._arrived.get()
        if isinstance(arrived, Exception):
            raise arrived
        if arrived is not None:
            if arrived.offset != self._next_offset:
                raise LaneLost(f"tokens came from {arrived.offset} on, {self._next_offset} was next")
            self._next_offset += len(arrived.token_ids)
        return arrived


class TokenInbox:
    """Binds a PULL socket of `context` on `host`."""

    def __init__(self, context: zmq.asyncio.Context, host: str) -> None:
        self._socket = context.socket(zmq.PULL)
        self.address = bind_random_port(self._socket, host)
        self._decoder: MessageDecoder[TokenBatch] = MessageDecoder(TokenBatch, "the router's tokens")
        self._readers: dict[str, TokenReader] = {}

    def open(self, request_id: str, attempt: int, offset: int) -> TokenReader:
        """The reader of a new attempt, in place of an older one."""
        reader = self._readers[request_id] = TokenReader(attempt, offset)
        return reader

    def close(self, request_id: str) -> None:
        self._readers.pop(request_id, None)

    @property
    def readers(self) -> dict[str, TokenReader]:
        """By request id."""
        return self._readers

    @property
    def num_dropped(self) -> int:
        """Messages and deltas that are none, are of an older attempt or belong to nobody."""
        return self._decoder.num_dropped

    async def receive(self) -> None:
        """Runs for as long as the router does."""
        while True:
            batch = self._decoder.decode(await self._socket.recv())
            if batch is None:
                continue
            for delta in batch.deltas:
                reader = self._readers.get(delta.request_id)
                if reader is None or reader.attempt != delta.attempt:
                    # Also the last tokens of a request whose client has just left.
                    self._decoder.drop(f"request {delta.request_id!r:.80} attempt {delta.attempt} is not open")
                else:
                    reader.put(batch.lane, delta)

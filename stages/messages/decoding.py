"""Decoding what comes from a socket: anybody who reaches its port can send anything."""

from __future__ import annotations

import logging
from typing import Any, Generic, TypeVar

import msgspec

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
"""ZeroMQ ends a connection that brings a longer message. The longest of ours, the log-probabilities of a whole
vocabulary for every token of a prompt, come in one."""

Message = TypeVar("Message")


class MessageDecoder(Generic[Message]):
    """Decodes the messages of one socket; never raises. For one thread."""

    def __init__(self, kind: Any, socket: str) -> None:
        """kind: the type of the messages, or a union. socket: its name in the log."""
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._socket = socket
        self.num_dropped = 0

    def decode(self, data: bytes) -> Message | None:
        """None for what is no such message: it is dropped and counted."""
        try:
            message: Message = self._decode(data)
        except (ValueError, OverflowError, RecursionError) as error:  # msgspec's own errors are ValueErrors
            self.drop(f"{len(data)} bytes are no message: {error}")
            return None
        return message

    def drop(self, reason: str) -> None:
        """Count a message that is not used. Logged the 1st, 2nd, 4th, 8th … time, so that a flood fills no disk."""
        self.num_dropped += 1
        if self.num_dropped.bit_count() == 1:
            logger.warning("%s: message %d dropped: %s", self._socket, self.num_dropped, reason)

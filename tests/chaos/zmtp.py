"""Just enough of ZMTP 3.0 (rfc.zeromq.org/spec/23) to see what listens, and to send what libzmq never would."""

from __future__ import annotations

import socket
from typing import Literal

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
PEER_OF = {"PULL": "PUSH", "PUB": "SUB", "ROUTER": "DEALER", "REP": "REQ", "XPUB": "SUB", "DEALER": "DEALER"}

Service = Literal["http", "http2", "silent", "closed"]


def command(name: bytes, body: bytes) -> bytes:
    content = bytes([len(name)]) + name + body
    return bytes([0x04, len(content)]) + content


def ready(socket_type: str) -> bytes:
    value = socket_type.encode()
    return command(b"READY", b"\x0bSocket-Type" + len(value).to_bytes(4, "big") + value)


def long_frame(size: int) -> bytes:
    """The head of a message of `size` bytes."""
    return b"\x02" + size.to_bytes(8, "big")


def shaken(host: str, port: int, socket_type: str, timeout_s: float = 5.0) -> socket.socket:
    """A connection past the handshake. Raises OSError."""
    connection = socket.create_connection((host, port), timeout=timeout_s)
    try:
        connection.sendall(GREETING)
        _exactly(connection, len(GREETING))
        connection.sendall(ready(socket_type))
    except OSError:
        connection.close()
        raise
    return connection


def socket_type(host: str, port: int) -> str | Service:
    """Of a listener: ZeroMQ's name of its type, or what else answers there."""
    try:
        with socket.create_connection((host, port), timeout=2) as connection:
            connection.settimeout(0.7)
            # libzmq speaks first.
            if _exactly(connection, 10)[:1] != b"\xff":
                return "http2"
            connection.sendall(GREETING)
            _exactly(connection, 54)
            connection.sendall(ready("PUSH"))
            flags, size = _exactly(connection, 2)
            content = _exactly(connection, size if flags == 0x04 else 0)
            return _property(content, b"Socket-Type")
    except TimeoutError:
        return _not_zeromq(host, port)
    except OSError:
        return "closed"


def _not_zeromq(host: str, port: int) -> Service:
    probes: list[tuple[bytes, bytes, Service]] = [
        (b"GET /-/healthz HTTP/1.1\r\nHost: test\r\n\r\n", b"HTTP/1", "http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\0\0", "http2"),
    ]
    for hello, sign, found in probes:
        try:
            with socket.create_connection((host, port), timeout=2) as connection:
                connection.settimeout(0.7)
                connection.sendall(hello)
                if connection.recv(16).startswith(sign):
                    return found
        except OSError:
            continue
    return "silent"


def _property(content: bytes, name: bytes) -> str:
    at = content.find(name)
    if at < 0:
        raise ConnectionError("no READY")
    at += len(name)
    size = int.from_bytes(content[at : at + 4], "big")
    return content[at + 4 : at + 4 + size].decode()


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("closed in the handshake")
        received += part
    return received

"""Plans to the workers and results back, tokens and stats to the routers: msgpack over ZeroMQ.

Every epoch opens fresh sockets, and its messages carry its number. PUSH/PULL keeps the order of each sender, never
blocks and queues what is sent before the peer has connected: at most ZeroMQ's 1000 messages at the sender and
MAX_UNREAD_MESSAGES at the receiver. Behind that, a PUSH socket says that its peer is gone, a PUB socket drops what its
subscriber does not read, and a PULL socket lets its senders wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from stagemesh.stages.messages.decoding import MAX_MESSAGE_BYTES, MessageDecoder
from stagemesh.stages.messages.request import LaneStats, TokenBatch, TokenDelta
from stagemesh.stages.messages.step import LeaderMessage, SampledTokens, ToWorker, WorkerMessage

MAX_UNREAD_MESSAGES = 100
"""Of each peer of a PULL socket; the others wait at the peer."""
ROUTER_IDLE_S = 60.0
"""The link to a router closes after this long without a token."""


ROUTER_HEARTBEAT_MS = 2_000
ROUTER_TIMEOUT_MS = 10_000
"""A router that does not answer ZeroMQ's heartbeats for so long counts as dead. One whose process ends does at once."""


class ChannelClosed(RuntimeError):
    """A peer's queue is full: it is gone."""


def bind_random_port(socket: zmq.Socket[Any], host: str) -> str:
    """Bind to any port of `host`, with bounds for messages; returns the address."""
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RCVHWM, MAX_UNREAD_MESSAGES)
    port = socket.bind_to_random_port(f"tcp://{host}")
    return f"tcp://{host}:{port}"


class _PlanSockets:
    """PUSH sockets to the plan sockets of workers; every message goes to all."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._encoder = msgspec.msgpack.Encoder()
        self._sockets: list[zmq.Socket[bytes]] = []

    def connect(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            socket = self._context.socket(zmq.PUSH)
            socket.connect(address)
            self._sockets.append(socket)

    def send(self, message: ToWorker) -> None:
        """Never waits; raises ChannelClosed."""
        data = self._encoder.encode(message)
        for socket in self._sockets:
            try:
                socket.send(data, zmq.NOBLOCK)
            except zmq.Again:
                raise ChannelClosed("a worker's plan queue is full: it no longer reads its plans") from None

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=500)  # for a StopRun sent just before; nobody waits for it
        self._sockets.clear()


class LeaderChannel:
    """The leader's end: a PUSH socket per worker, one PULL socket for all results. For one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str) -> None:
        self._decoder: MessageDecoder[WorkerMessage] = MessageDecoder(WorkerMessage, "the leader's results")
        self._workers = _PlanSockets(context)
        self.results = context.socket(zmq.PULL)
        self.address = bind_random_port(self.results, host)

    def connect(self, addresses: list[str]) -> None:
        self._workers.connect(addresses)

    def send(self, message: LeaderMessage) -> None:
        """To every worker; never waits; raises ChannelClosed."""
        self._workers.send(message)

    def receive(self) -> list[WorkerMessage]:
        """All messages that have arrived; never waits."""
        messages: list[WorkerMessage] = []
        while True:
            try:
                data = self.results.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = self._decoder.decode(data)
            if message is not None:
                messages.append(message)

    def close(self) -> None:
        """Free the sockets; safe to call twice."""
        self._workers.close()
        self.results.close(linger=0)


class WorkerChannel:
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str) -> None:
        self._context = context
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: MessageDecoder[ToWorker] = MessageDecoder(ToWorker, "a worker's plans")
        self._plans = context.socket(zmq.PULL)
        self.address = bind_random_port(self._plans, host)
        self._results = context.socket(zmq.PUSH)
        self._results.setsockopt(zmq.LINGER, 1000)
        self._first_stage = _PlanSockets(context)

    def connect(self, leader_address: str, sampled_tokens_to: Iterable[str] = ()) -> None:
        self._results.connect(leader_address)
        self._first_stage.connect(sampled_tokens_to)

    def receive(self, timeout_ms: int) -> list[ToWorker]:
        """All messages that have come, at most MAX_UNREAD_MESSAGES; waits for the first.

        One at a time would let whoever floods the socket keep the plans waiting: ZeroMQ takes from its peers in turn.
        """
        messages: list[ToWorker] = []
        if self._plans.poll(timeout_ms):
            for _ in range(MAX_UNREAD_MESSAGES):
                if (message := self._decoder.decode(self._plans.recv())) is not None:
                    messages.append(message)
                if not int(self._plans.get(zmq.EVENTS)) & zmq.POLLIN:
                    break
        return messages

    def interrupt(self, message: ToWorker) -> None:
        """Let `receive`, which waits in another thread, return with `message`. From any thread."""
        with self._context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 1000)  # the loop may end without reading it
            socket.connect(self.address)
            socket.send(msgspec.msgpack.encode(message))

    def send(self, message: WorkerMessage) -> None:
        self._results.send(self._encoder.encode(message))

    def send_sampled_tokens(self, tokens: SampledTokens) -> None:
        """To the workers of stage 0; never waits; raises ChannelClosed."""
        self._first_stage.send(tokens)

    def close(self) -> None:
        """Free the sockets; safe to call twice."""
        self._plans.close(linger=0)
        self._results.close()
        self._first_stage.close()


class _Link:
    """To one router, from its first request on."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.PUSH)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, ROUTER_HEARTBEAT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ROUTER_TIMEOUT_MS)
        self._events = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
        self.socket.connect(address)
        self.used_at = time.monotonic()

    def is_gone(self) -> bool:
        """Whether the router's process has ended, or cannot be reached."""
        try:
            recv_monitor_message(self._events, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self, linger: int = 0) -> None:
        self.socket.disable_monitor()
        self._events.close(linger=0)
        self.socket.close(linger=linger)


class RouterLinks:
    """A leader's sockets to the routers: tokens to one, stats to all. For one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, lane: str) -> None:
        self._context = context
        self._lane = lane
        self._encoder = msgspec.msgpack.Encoder()
        self._routers: dict[str, _Link] = {}
        self._stats = context.socket(zmq.PUB)
        self.stats_address = bind_random_port(self._stats, host)

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        """Send `deltas` in one message; False when the router's queue is full: it is gone."""
        link = self._link(reply_to)
        try:
            link.socket.send(self._encoder.encode(TokenBatch(self._lane, deltas)), zmq.NOBLOCK)
        except zmq.Again:
            self._routers.pop(reply_to).close()
            return False
        return True

    def publish(self, stats: LaneStats) -> None:
        self._stats.send(self._encoder.encode(stats))

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        """Those of these routers that have died. Links that nobody uses are closed."""
        dead = {address for address in reply_to if self._link(address).is_gone()}
        now = time.monotonic()
        idle = {address for address, link in self._routers.items() if now - link.used_at > ROUTER_IDLE_S}
        for address in dead | idle:
            self._routers.pop(address).close()
        return dead

    def close(self) -> None:
        """Free the sockets; safe to call twice. The engine's thread must have ended."""
        for link in self._routers.values():
            link.close(linger=500)
        self._routers.clear()
        self._stats.close(linger=0)

    def _link(self, address: str) -> _Link:
        link = self._routers.get(address)
        if link is None:
            link = self._routers[address] = _Link(self._context, address)
        link.used_at = time.monotonic()
        return link

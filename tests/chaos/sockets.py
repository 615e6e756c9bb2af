"""Garbage to every ZeroMQ socket of ours, and to those that torch opens, beside healthy streams."""

from __future__ import annotations

import itertools
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import msgspec
import zmq
from chaos import zmtp
from chaos.judging import judge_growth, judge_idle, judge_ready, judge_traffic
from chaos.processes import listeners, memory_by_process, ours, settled_books, state, wait_whole
from chaos.report import Report
from chaos.traffic import Traffic, asks
from support.harness import Cluster, chat

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.messages import request, step

MAX_GROWTH_MB = 200.0
STUCK_S = 15.0
"""A socket that takes nothing for so long is no longer read."""
MAX_RANDOM_BYTES = 64 << 10
OVERSIZE_BYTES = 300 << 20
HALF_OPEN = 40
"""Connections to each socket that stop in the middle of a handshake or a message."""
NUMBERS = [0, 1, -1, 7, 2**31 - 1, 2**31, -(2**31) - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1]


class Target(NamedTuple):
    kind: str
    """Of the process."""
    pid: int
    host: str
    port: int
    type: str
    """ZeroMQ's name, or as in zmtp.Service."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.type}"


def find_targets() -> list[Target]:
    """Every listening socket of our processes. One answers for several processes where they inherited it."""
    processes = [(kind, pid) for kind, pids in ours().items() for pid in pids]
    found = {listener.port: (kind, listener) for kind, pid in processes for listener in listeners(pid)}
    with ThreadPoolExecutor(16) as pool:  # most of it waits for what does not come
        types = pool.map(lambda entry: zmtp.socket_type(entry[1].host, entry[1].port), found.values())
        return [Target(kind, *listener, type) for (kind, listener), type in zip(found.values(), types, strict=True)]


def run(cluster: Cluster, *, messages: int = 100_000, torch_connections: int = 3_000, streams: int = 4) -> Report:
    """messages: to each ZeroMQ socket. torch_connections: to torch's sockets in all, whose outcome is only reported."""
    report = Report("sockets")
    targets = find_targets()
    attacked = [target for target in targets if target.type in zmtp.PEER_OF]
    report.data["listening"] = dict(Counter(target.name for target in targets))
    for kind in ("worker", "leader", "router"):
        report.check(any(t.kind == kind and t.type == "PULL" for t in attacked), f"{kind}s listen with a PULL socket")
    memory = memory_by_process()
    traffic = Traffic(cluster.url, asks(1, 48), streams)
    sent: Counter[str] = Counter()
    with traffic:
        held = [connection for target in attacked for connection in _half_open(target)]
        for i, target in enumerate(attacked):
            count, problem = _fuzz(target, messages, random.Random(i))
            sent[target.name] += count
            report.check(problem == "", f"{target.name} takes messages", problem)
            report.check(not _refused(target), f"{target.name} still listens")
            for connection in held:  # slowly
                with suppress(OSError):
                    connection.send(b"x")
            oversize = _oversize(target, random.Random(i))
            report.data.setdefault("oversize", {}).setdefault(target.name, oversize)
            whole = f"{target.name} cuts off a message of 300 MB"
            report.check(oversize["300 MB"].startswith("cut off"), whole, oversize["300 MB"])
        for connection in held:
            connection.close()
    judge_idle(report, cluster)
    judge_ready(report, cluster)
    judge_growth(report, memory, memory_by_process(), MAX_GROWTH_MB)
    _judge_new_request(report, cluster)
    judge_traffic(report, traffic)
    report.data |= {"sent": dict(sent), "half_open": len(held)}
    if torch_connections:
        report.data["torch"] = _torch(cluster, targets, torch_connections)
    return report


def _judge_new_request(report: Report, cluster: Cluster) -> None:
    with cluster.client() as client:
        try:
            answer = chat(client, "What is 17+25?")
        except (AssertionError, httpx.HTTPError) as error:
            answer = repr(error)[:300]
    report.check(answer == "42", "a new request is answered", answer)


def _fuzz(target: Target, count: int, rng: random.Random) -> tuple[int, str]:
    """Send `count` messages, over several connections in turn. Returns how many went and what stopped it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sent = 0
    messages = _messages(target.kind, rng)
    try:
        while sent < count:
            if state(target.pid) == "":
                return sent, f"its process died after {sent} messages"
            batch = min(count - sent, 2_000)
            done = _send_batch(context, target, itertools.islice(messages, batch))
            sent += done
            if done < batch:
                return sent, f"nothing was taken for {STUCK_S:g} s after {sent} messages"
    finally:
        context.destroy(linger=0)
    return sent, ""


def _send_batch(context: zmq.Context[zmq.Socket[bytes]], target: Target, messages: Iterator[bytes]) -> int:
    """On a connection of its own. To a PUB socket these are subscriptions, half of them taken back."""
    peer = context.socket(getattr(zmq, zmtp.PEER_OF[target.type]))
    peer.setsockopt(zmq.SNDTIMEO, int(STUCK_S * 1000))
    peer.setsockopt(zmq.SNDHWM, 200)
    peer.connect(f"tcp://{target.host}:{target.port}")
    sent = 0
    try:
        for message in messages:
            if peer.type == zmq.SUB:
                peer.setsockopt(zmq.UNSUBSCRIBE if sent % 2 else zmq.SUBSCRIBE, message[:4096])
            elif sent % 50 == 49:
                peer.send_multipart([message, b"", message[:100]])
            else:
                peer.send(message)
            sent += 1
    except zmq.Again:
        pass
    finally:
        peer.close(linger=5_000)
    return sent


def _messages(kind: str, rng: random.Random) -> Iterator[bytes]:
    """Without end: random bytes, msgpack of wrong shapes, messages of the real types with wrong contents, and broken
    ones of these."""
    encode = msgspec.msgpack.Encoder().encode
    real = _REAL[kind]
    while True:
        choice = rng.random()
        if choice < 0.25:
            yield rng.randbytes(int(MAX_RANDOM_BYTES ** rng.random()))
        elif choice < 0.45:
            yield encode(_shape(rng, 3))
        elif choice < 0.8:
            with suppress(OverflowError):
                yield encode(rng.choice(real)(rng))
        else:
            with suppress(OverflowError):
                yield _broken(encode(rng.choice(real)(rng)), rng)


def _broken(data: bytes, rng: random.Random) -> bytes:
    """Cut, with another byte, or with more behind it."""
    at = rng.randrange(len(data))
    return rng.choice([data[:at], data[:at] + rng.randbytes(1) + data[at + 1 :], data + rng.randbytes(8)])


def _shape(rng: random.Random, depth: int) -> Any:
    """Anything that msgpack can hold."""
    leaves = [None, True, 1.5, float("nan"), "plan", "result", "", b"\0" * 40, rng.choice(NUMBERS), "x" * 5_000]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(leaves)
    children = [_shape(rng, depth - 1) for _ in range(rng.randrange(6))]
    if rng.random() < 0.3:
        return {str(i): child for i, child in enumerate(children)}
    tag = rng.choice(["plan", "tokens", "stop", "result", "stats", "failure", None])
    return [tag, *children] if tag else children


def _number(rng: random.Random) -> int:
    return rng.choice(NUMBERS) if rng.random() < 0.5 else rng.randrange(2**40)


def _epoch(rng: random.Random) -> int:
    """An old one, of the kind that lanes have, or none at all."""
    old = (time.time_ns() // 1000 - rng.randrange(10**6, 10**12)) << 10
    return rng.choice([old, old + (10**12 << 10), 0, 1, -1, 2**63 - 1, rng.randrange(2**62)])


def _numbers(rng: random.Random, most: int = 8) -> list[int]:
    return [_number(rng) for _ in range(rng.randrange(most))]


def _plan(rng: random.Random) -> step.StepPlan:
    size = rng.choice([0, 1, 3, 200])
    sample = step.SampleSpec(1e308, -1.0, _number(rng), 9.0, rng.randrange(2**64), _number(rng), _numbers(rng))
    return step.StepPlan(
        epoch=_epoch(rng),
        step=_number(rng),
        seq_ids=_numbers(rng),
        query_lens=rng.randbytes(size),
        context_lens=rng.randbytes(4 * size),
        token_ids=rng.randbytes(4 * size),
        block_tables=rng.randbytes(4 * size),
        max_blocks=_number(rng),
        samples=[sample, None],
        placeholder_step=_number(rng),
    )


def _delta(rng: random.Random) -> request.TokenDelta:
    reason = rng.choice([None, "stop", "error", "no such reason"])
    name = rng.choice(["", "warm-up", "cmpl-0", "x" * 3_000, f"{rng.randrange(2**64):x}"])
    return request.TokenDelta(name, _number(rng), _numbers(rng), reason, error="fuzz", attempt=_number(rng))


def _lane_request(rng: random.Random) -> request.EngineRequest:
    return request.EngineRequest("fuzz", _numbers(rng), SamplingParams(), "tcp://127.0.0.1:1")


_REAL: dict[str, list[Callable[[random.Random], Any]]] = {
    "worker": [
        _plan,
        lambda rng: step.SampledTokens(_epoch(rng), _number(rng), _numbers(rng)),
        lambda rng: step.StopRun(_epoch(rng)),
    ],
    "leader": [
        lambda rng: step.StepResult(_epoch(rng), _number(rng), _numbers(rng), pooled=[rng.randbytes(9)]),
        lambda rng: step.WorkerStats(_epoch(rng), _number(rng), [(1e308, -1e308)], _numbers(rng), [float("nan")]),
        lambda rng: step.StepFailure(_epoch(rng), _number(rng), _number(rng), _number(rng), "x" * rng.randrange(9_000)),
    ],
    "router": [
        lambda rng: request.TokenBatch("no lane", [_delta(rng) for _ in range(rng.randrange(20))]),
        lambda rng: request.TokenBatch("x" * rng.randrange(5_000), []),
        lambda rng: _delta(rng),
    ],
}
_REAL["stage"] = [make for kind in ("worker", "leader", "router") for make in _REAL[kind]] + [_lane_request]


def _half_open(target: Target) -> Iterator[socket.socket]:
    """Connections that stop: before the handshake, in it, after it, in a message."""
    beginnings = [b"", zmtp.GREETING[:7], zmtp.GREETING[:40], zmtp.GREETING, zmtp.GREETING + b"\x04\xff"]
    for i in range(HALF_OPEN):
        with suppress(OSError):
            if i % 4 == 3:
                connection = zmtp.shaken(target.host, target.port, zmtp.PEER_OF[target.type])
                beginning = zmtp.long_frame(5_000) + b"slow"
            else:
                connection = socket.create_connection((target.host, target.port), timeout=5)
                beginning = beginnings[i % len(beginnings)]
            yield connection  # first, so that it is closed whatever comes
            connection.sendall(beginning)


def _oversize(target: Target, rng: random.Random) -> dict[str, str]:
    """Announced sizes up to 8 EB, and 300 MB that really come. Returns for each how far it got."""
    ends: dict[str, str] = {}
    peer = zmtp.PEER_OF[target.type]
    for size in (OVERSIZE_BYTES, 2**40, 2**63 - 1, 2**64 - 1):
        ends[f"announced {size}"] = _push(target, peer, zmtp.long_frame(size), 1 << 16, rng)
    ends["300 MB"] = _push(target, peer, zmtp.long_frame(OVERSIZE_BYTES), OVERSIZE_BYTES, rng)
    for _ in range(20):
        with suppress(OSError), socket.create_connection((target.host, target.port), timeout=2) as connection:
            connection.sendall(rng.randbytes(int(MAX_RANDOM_BYTES ** rng.random())))
    return ends


def _push(target: Target, peer: str, head: bytes, size: int, rng: random.Random) -> str:
    sent = 0
    try:
        with zmtp.shaken(target.host, target.port, peer) as connection:
            connection.sendall(head)
            part = rng.randbytes(1 << 16)
            while sent < size:
                connection.sendall(part)
                sent += len(part)
            connection.settimeout(1.0)
            with suppress(TimeoutError):
                while connection.recv(4096):
                    pass
                return f"cut off after {sent >> 10} KiB"
    except OSError:
        return f"cut off after {sent >> 10} KiB"
    return f"taken: {sent >> 10} KiB"


def _refused(target: Target) -> bool:
    try:
        socket.create_connection((target.host, target.port), timeout=5).close()
    except OSError:
        return True
    return False


def _torch(cluster: Cluster, targets: list[Target], connections: int) -> dict[str, Any]:
    """Garbage to the listeners of workers that are not ZeroMQ's: torch's rendezvous store and gloo."""
    aimed = [target for target in targets if target.kind == "worker" and target.type == "silent"]
    if not aimed:
        return {"sockets": 0}
    before = settled_books(cluster, 120)
    pids = {pid for pids in ours().values() for pid in pids}
    rng = random.Random(3)
    traffic = Traffic(cluster.url, asks(1, 48), 2)
    started = time.monotonic()
    with traffic:
        for i in range(connections):
            target = aimed[i % len(aimed)]
            with suppress(OSError), socket.create_connection((target.host, target.port), timeout=2) as connection:
                connection.sendall(rng.randbytes(int(4096 ** rng.random())))
        took_s = time.monotonic() - started
    whole_s, missing = wait_whole(cluster, before, 120)
    traffic.compare()
    summary = traffic.summary()
    now = {pid for pids in ours().values() for pid in pids}
    return {
        "sockets": len(aimed),
        "connections": connections,
        "took_s": round(took_s, 1),
        "processes_replaced": len(now - pids),
        "whole_after_s": round(whole_s, 1),
        "missing": missing,
        "lanes": len(cluster.lanes()),
        "requests": summary["requests"],
        "failed": summary["failures"],
        "wrong": summary["wrong"],
        "pause_s": summary["pause_s"],
    }

"""Ten times as many requests as the application can answer: refused at once, and what is accepted finishes.

The load generator shares the machine's cores with the application; it is one process that reads and writes sockets and
parses nothing but what it must.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from chaos.judging import judge_idle
from chaos.processes import OURS, is_idle, memory_mb, ours
from chaos.report import Report, spread
from support.harness import Cluster, eventually

FACTOR = 10
DEADLINE_S = 60.0
"""Of a request, sent as `timeout` where the server knows that field."""
REFUSED_WITHIN_MS = 50.0
TTFT_FACTOR = 3.0
MAX_GROWTH_MB = 200.0
LARGEST_CLIENTS = 512
MAX_OPEN = 8_000
"""Requests at once: a server that refuses nothing would use up this machine's ports."""


@dataclass
class Seen:
    ttft_s: list[float] = field(default_factory=list)
    """Of accepted requests."""
    duration_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    """Until the last byte of a 429."""
    no_retry_after: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    """What was neither refused nor finished."""
    not_sent: int = 0
    """For want of connections here."""
    elapsed_s: float = 0.0


def run(
    cluster: Cluster,
    *,
    seconds: float = 60.0,
    capacity_s: float = 15.0,
    most_clients: int = LARGEST_CLIENTS,
    max_tokens: int = 96,
    least_requests: int = 0,
    timed: bool = True,
) -> Report:
    """least_requests: sent however slow the machine is.

    timed: also check what a busy machine makes slow: how soon refusals and first tokens come.
    """
    return asyncio.run(_run(cluster, seconds, capacity_s, most_clients, max_tokens, least_requests, timed))


async def _run(
    cluster: Cluster,
    seconds: float,
    capacity_s: float,
    most_clients: int,
    max_tokens: int,
    least_requests: int,
    timed: bool,
) -> Report:
    report = Report("overload")
    knows_timeout = await _knows_timeout(cluster)
    body = _body(knows_timeout, max_tokens)
    clients, at_capacity = await _capacity(cluster, body, capacity_s, most_clients)
    rate = len(at_capacity.duration_s) / at_capacity.elapsed_s
    eventually(lambda: is_idle(cluster), 60, "the application is idle")
    before = _memory()
    peak = dict(before)
    seen = Seen()
    watching = asyncio.create_task(_watch_memory(peak))
    lag: list[float] = []
    await _open_loop(cluster, body, max(FACTOR * rate, least_requests / seconds), seconds, seen, lag)
    watching.cancel()
    await asyncio.to_thread(judge_idle, report, cluster, 90)
    after = _memory()
    ttft, ttft_at_capacity = spread(seen.ttft_s, 1000, 1), spread(at_capacity.ttft_s, 1000, 1)
    refused = spread(seen.refused_s, 1000, 1)
    report.data |= {
        "capacity": {
            "clients": clients,
            "requests_per_s": round(rate, 1),
            "tokens_per_s": round(rate * max_tokens, 1),
            "ttft_ms": ttft_at_capacity,
        },
        "overload": {
            "requests_per_s": round(FACTOR * rate, 1),
            "seconds": seconds,
            "accepted": len(seen.duration_s),
            "refused": len(seen.refused_s),
            "broken": dict(seen.broken),
            "not_sent": seen.not_sent,
            "ttft_ms": ttft,
            "duration_s": spread(seen.duration_s),
            "refused_ms": refused,
            "generator_lag_ms": spread(lag, 1000, 1),
        },
        "memory_mb": {"before": before, "peak": peak, "after": after},
        "timeout_sent": knows_timeout,
        "note": "the generator shares the cores with the application",
    }
    report.check(rate > 0, "requests are answered at capacity", dict(at_capacity.broken))
    _judge(report, seen)
    if timed:
        _judge_times(report, ttft, ttft_at_capacity, refused)
    grown = {kind: round(peak[kind] - before[kind], 1) for kind in before}
    if not timed:
        del grown["worker"]  # where fewer clients than fit were tried, their first larger batch comes now
    report.check(all(mb < MAX_GROWTH_MB for mb in grown.values()), "memory is flat", grown)
    await asyncio.sleep(0.1)  # closed connections end in the event loop
    return report


def _judge(report: Report, seen: Seen) -> None:
    report.check(len(seen.refused_s) > 0, "more than can be answered is refused")
    report.check(seen.no_retry_after == 0, "every refusal has Retry-After", seen.no_retry_after)
    report.check(not seen.broken, "what is accepted finishes", dict(seen.broken))
    late = max(seen.duration_s, default=0.0)
    report.check(late < DEADLINE_S + 1, "what is accepted finishes within its deadline", round(late, 1))


def _judge_times(
    report: Report, ttft: dict[str, float], ttft_at_capacity: dict[str, float], refused: dict[str, float]
) -> None:
    report.check(refused.get("p50", 0) < REFUSED_WITHIN_MS, f"refusals come in {REFUSED_WITHIN_MS:g} ms (p50)", refused)
    allowed = TTFT_FACTOR * ttft_at_capacity.get("p99", 0)
    report.check(ttft.get("p99", 1e9) <= allowed, f"p99 TTFT of the accepted stays below {allowed:.0f} ms", ttft)


def _body(with_timeout: bool, max_tokens: int = 4) -> bytes:
    fields: dict[str, Any] = {
        "model": "demo",
        "prompt": "Enter the king and the queen, and all their court. The king:",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps({**fields, "timeout": DEADLINE_S} if with_timeout else fields).encode()


async def _knows_timeout(cluster: Cluster) -> bool:
    seen = Seen()
    await _one(cluster, _body(True), seen)
    return len(seen.duration_s) == 1


async def _capacity(cluster: Cluster, body: bytes, seconds: float, most_clients: int) -> tuple[int, Seen]:
    """The most clients in closed loop of which none is refused, and what they see."""
    clients = 16
    while 2 * clients <= most_clients and not (await _closed_loop(cluster, body, 2 * clients, 0)).refused_s:
        clients *= 2
    while True:
        seen = await _closed_loop(cluster, body, clients, seconds)
        if not seen.refused_s or clients == 1:
            return clients, seen
        clients = max(1, clients * 3 // 4)


async def _closed_loop(cluster: Cluster, body: bytes, clients: int, seconds: float) -> Seen:
    """Until `seconds` are over and each client has had an answer; counts all that was sent."""
    seen = Seen()
    started = time.monotonic()

    async def client() -> None:
        first = True
        while first or time.monotonic() < started + seconds:
            first = False
            await _one(cluster, body, seen)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.elapsed_s = time.monotonic() - started
    return seen


async def _open_loop(cluster: Cluster, body: bytes, rate: float, seconds: float, seen: Seen, lag: list[float]) -> None:
    """`rate` requests a second, whatever comes back. lag: how late each was sent."""
    started = time.monotonic()
    running: set[asyncio.Task[None]] = set()
    for i in range(int(rate * seconds)):
        at = started + i / rate
        if (wait := at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if time.monotonic() - started > seconds:
            break  # the generator cannot keep up: what it did send was more than enough
        lag.append(max(0.0, time.monotonic() - at))
        if len(running) >= MAX_OPEN:
            seen.not_sent += 1
            continue
        task = asyncio.create_task(_one(cluster, body, seen))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        _, late = await asyncio.wait(running, timeout=DEADLINE_S + 5)
        for task in late:
            task.cancel()
        if late:
            seen.broken["not finished within the deadline"] += len(late)


async def _one(cluster: Cluster, body: bytes, seen: Seen) -> None:
    started = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http_port)
    except OSError as error:
        seen.broken[f"connect: {error.strerror}"] += 1
        return
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        status = answer[9:12].decode(errors="replace")
        if status == "200":
            await _read_stream(reader, started, seen)
        else:
            rest = await reader.read()
            if status == "429":
                seen.refused_s.append(time.monotonic() - started)
                seen.no_retry_after += b"\r\nretry-after:" not in answer.lower()
            else:
                seen.broken[f"{status} {rest[-200:].decode(errors='replace')}"] += 1
    except (OSError, asyncio.IncompleteReadError) as error:
        seen.broken[type(error).__name__] += 1
    finally:
        writer.close()


async def _read_stream(reader: asyncio.StreamReader, started: float, seen: Seen) -> None:
    first = 0.0
    pieces = 0
    tail = b""
    while part := await reader.read(65536):
        count = (tail + part).count(b"data: {") - tail.count(b"data: {")
        tail = (tail + part)[-400:]
        if count and not first:
            first = time.monotonic()
        pieces += count
    if b"data: [DONE]" not in tail or b'"error":{' in tail:
        seen.broken[f"stream ended with {tail[-160:].decode(errors='replace')}"] += 1
        return
    seen.ttft_s.append(first - started)
    seen.duration_s.append(time.monotonic() - started)


def _memory() -> dict[str, float]:
    """MB by kind: the largest process of each."""
    return {kind: round(max((memory_mb(pid) for pid in pids), default=0.0), 1) for kind, pids in ours().items()}


async def _watch_memory(peak: dict[str, float]) -> None:
    while True:
        await asyncio.sleep(2.0)
        now = await asyncio.to_thread(_memory)
        for kind in OURS:
            peak[kind] = max(peak[kind], now[kind])

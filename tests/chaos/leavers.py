"""Clients that leave: whatever they sent and whenever they go, what they asked for must end within a second."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import httpx
from chaos.judging import judge_idle
from chaos.report import Report, spread
from support.harness import Cluster, eventually

from stagemesh.deployments.proto import inference_pb2, inference_pb2_grpc

LIMIT_BYTES = 1 << 20
"""Of a body."""
SIZES = (1, 10_000, 40_000, 200_000, LIMIT_BYTES - 1_000, LIMIT_BYTES)
"""In bytes; 1 is no valid request."""
FEW_SIZES = (1_000, 40_000)
FREED_WITHIN_S = 1.0
SLOW_MACHINE_S = 2.0
"""What fails: a second, and the time that `/metrics` takes to say so on two busy cores."""
GIVE_UP_S = 8.0
QUIET_S = 0.4
"""Nothing runs for this long: it was not between two steps."""
MAX_TOKENS = 1900
WORK = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


class Case(NamedTuple):
    door: str
    """"http" or "grpc"."""
    size: int
    streamed: bool
    moment: str
    """"first" (before the first token), "middle" or "queued"."""
    resets: bool
    """The connection is reset rather than closed; over gRPC closed rather than the call cancelled."""

    def __str__(self) -> str:
        hard, soft = ("resets", "closes") if self.door == "http" else ("closes", "cancels")
        answer, end = "streamed" if self.streamed else "whole", hard if self.resets else soft
        return f"{self.door} {self.size} B {answer} {self.moment} {end}"


def run(cluster: Cluster, sizes: tuple[int, ...] = SIZES) -> Report:
    """All cases but the queued ones."""
    moments = ("first", "middle")
    cases = [
        Case(*case)
        for case in itertools.product(("http", "grpc"), sizes, (True, False), moments, (True, False))
        if case[1] > 1 or (case[0] == "http" and case[3] == "first")
    ]
    return _run(cluster, "leavers", cases, WORK)


def run_queued(cluster: Cluster, sizes: tuple[int, ...] = FEW_SIZES) -> Report:
    """Two requests fill the lane, whose max_num_seqs must be 2; the third waits and leaves."""
    both = (True, False)
    cases = [Case(*case) for case in itertools.product(("http", "grpc"), sizes, both, ("queued",), both)]
    return _run(cluster, "leavers-queued", cases, WORK[1:2])


def _run(cluster: Cluster, part: str, cases: list[Case], names: tuple[str, ...]) -> Report:
    """names: the metrics that must fall to 0."""
    report = Report(part)
    times: dict[str, float] = {}
    with cluster.client() as client:
        for case in cases:
            try:
                times[str(case)] = _one(cluster, case, lambda: _is_zero(client, names))
            except (OSError, grpc.RpcError, TimeoutError, ValueError, httpx.HTTPError) as error:
                report.check(False, str(case), f"{type(error).__name__}: {str(error)[:200]}")
            if not judge_idle(report, cluster):
                report.data["given_up_after"] = str(case)
                break
    over = {name: round(taken, 2) for name, taken in times.items() if taken > FREED_WITHIN_S}
    report.data |= {"cases": len(times), "freed_s": spread(list(times.values())), "over_a_second": over}
    late = {name: taken for name, taken in over.items() if taken > SLOW_MACHINE_S}
    report.check(late == {}, f"what a client that left had asked for ends within {SLOW_MACHINE_S:g} s", late)
    return report


def _one(cluster: Cluster, case: Case, is_done: Callable[[], bool]) -> float:
    """Seconds from leaving until it is seen that nothing of it is left; GIVE_UP_S where something stays."""
    with _lane_full(cluster, case.moment == "queued"):
        leave = _over_http(cluster, case) if case.door == "http" else _over_grpc(cluster, case)
        if case.moment == "queued":
            eventually(lambda: cluster.metrics()["vllm:num_requests_waiting"] > 0, 10, "it waits")
        left = time.monotonic()
        leave()
        done_at: float | None = None
        while (now := time.monotonic()) - left < GIVE_UP_S and (done_at is None or now - done_at < QUIET_S):
            if not is_done():
                done_at = None
            elif done_at is None:
                done_at = time.monotonic()
            time.sleep(0.01)
    return GIVE_UP_S if done_at is None else done_at - left


def _is_zero(client: httpx.Client, names: tuple[str, ...]) -> bool:
    """Of every lane. Faster than a whole parser, for it is asked all the time."""
    lines = client.get("/metrics").text.splitlines()
    return all(float(line.rpartition(" ")[2]) < 1e-9 for line in lines if line.startswith(names))


@contextmanager
def _lane_full(cluster: Cluster, wanted: bool) -> Iterator[None]:
    """Two sequences run meanwhile."""
    holders = [_over_http(cluster, Case("http", 0, True, "middle", False)) for _ in range(2 if wanted else 0)]
    try:
        yield
    finally:
        for leave in holders:
            leave()


def _over_http(cluster: Cluster, case: Case) -> Callable[[], None]:
    """Sends the request and waits for the moment; returns how to leave."""
    connection = socket.create_connection(("127.0.0.1", cluster.http_port), timeout=30)
    body = _body(case)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n"
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
    connection.sendall(body)  # apart, as most clients do
    if case.moment == "middle" and case.streamed:
        _read_events(connection, 5)
    elif case.moment == "middle":
        eventually(lambda: cluster.metrics()["vllm:num_requests_running"] > 0, 20, "it runs")

    def leave() -> None:
        if case.resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    return leave


def _body(case: Case) -> bytes:
    if case.size == 1:
        return b"{"
    fields: dict[str, Any] = {
        "model": "demo",
        "prompt": "The king",
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "stream": case.streamed,
        "user": "",
    }
    fields["user"] = "x" * (case.size - len(json.dumps(fields)))
    return json.dumps(fields).encode()


def _read_events(connection: socket.socket, count: int) -> None:
    received = b""
    while received.count(b"data: {") < count:
        part = connection.recv(65536)
        if not part or not received.startswith(b"HTTP/1.1 200"[: len(received)]):
            raise ValueError(f"no stream: {(received + part)[:300]!r}")
        received += part


def _over_grpc(cluster: Cluster, case: Case) -> Callable[[], None]:
    channel = grpc.insecure_channel(cluster.grpc_address)
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.ChatRequest(
        model="demo",
        messages=[inference_pb2.ChatMessage(role="user", content="The king")],
        sampling=inference_pb2.Sampling(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    request.chat_template_kwargs["padding"] = "x" * max(0, case.size - 200)
    call = stub.ChatStream(request, timeout=60) if case.streamed else stub.Chat.future(request, timeout=60)
    if case.moment == "middle" and case.streamed:
        for _ in range(5):
            next(call)
    elif case.moment == "middle":
        eventually(lambda: cluster.metrics()["vllm:num_requests_running"] > 0, 20, "it runs")
    elif case.moment == "first":
        time.sleep(0.05)  # else it would be cancelled before it is sent

    def leave() -> None:
        if not case.resets:
            call.cancel()
        channel.close()

    return leave

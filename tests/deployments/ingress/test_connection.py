"""A stream's connection: its head comes at once, it is kept alive, and a client that does not read is cut off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from stagemesh.deployments.ingress import connection
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.sse import WAITING
from stagemesh.stages.messages.request import TokenDelta

pytestmark = pytest.mark.anyio


class Reader:
    """A client of one streamed completion that stops reading after so many writes."""

    def __init__(self, service: Any, *, reads: int = 10**6) -> None:
        self.reads = reads
        self.written: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        body = json.dumps({"prompt": "Hi", "max_tokens": 30, "stream": True}).encode()
        self._received = [{"type": "http.request", "body": body, "more_body": False}]
        path = "/v1/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": [], "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1"}
        self.task = asyncio.create_task(build_http_app(service)(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._received:
            return self._received.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Any) -> None:
        if len(self.written) >= self.reads:
            await asyncio.Event().wait()
        self.written.append(message)
        self.arrived.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.written) < count:
                self.arrived.clear()
                await self.arrived.wait()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.written[1:]]


async def test_the_head_comes_before_the_first_token(service, lanes):
    lanes.pause_after = 0
    client = Reader(service)
    await client.until(1)
    assert client.written[0]["status"] == 200
    lanes.resume.set()
    await client.task
    assert client.bodies[-1] == b"data: [DONE]\n\n"


async def test_a_failure_after_the_head_is_an_event(service, lanes):
    lanes.pause_after = 0
    lanes.deltas = [TokenDelta("", 0, [], finish_reason="abort", error="no lane came")]
    client = Reader(service)
    await client.until(1)
    lanes.resume.set()
    await client.task
    assert client.written[0]["status"] == 200
    (body,) = client.bodies
    event, *end = body.split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "no lane came"
    assert end == [b"data: [DONE]", b""]


@pytest.mark.parametrize("pause_after", [0, 2])
async def test_a_quiet_stream_is_kept_alive(service, lanes, monkeypatch, pause_after):
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.02)
    lanes.pause_after = pause_after
    client = Reader(service)
    await client.until(1 + pause_after + 3)
    assert client.bodies[pause_after:] == [WAITING] * len(client.bodies[pause_after:])
    lanes.resume.set()
    await client.task
    assert client.bodies[-1] == b"data: [DONE]\n\n"
    assert sum(b'"text"' in body for body in client.bodies) > 3


@pytest.mark.parametrize("reads", [1, 3])
async def test_a_client_that_does_not_read_is_cut_off(service, lanes, monkeypatch, reads):
    monkeypatch.setattr(connection, "SLOW_READER_S", 0.05)
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.02)
    client = Reader(service, reads=reads)
    await asyncio.wait_for(client.task, 5)
    assert len(client.written) == reads
    assert not lanes.running and len(lanes.aborted) == 1
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in service.metrics.render().decode()


async def test_a_client_that_does_not_take_the_comment_is_cut_off(service, lanes, monkeypatch):
    monkeypatch.setattr(connection, "SLOW_READER_S", 0.05)
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.02)
    lanes.pause_after = 0
    client = Reader(service, reads=1)
    await asyncio.wait_for(client.task, 5)
    assert not lanes.running and len(lanes.aborted) == 1

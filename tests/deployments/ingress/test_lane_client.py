"""A request outlives its lane: the client of the lanes against leaders that die, drain, fall silent and lie."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import ray
import zmq
import zmq.asyncio

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.ingress import lane_client, lane_view, token_inbox
from stagemesh.deployments.ingress.lane_client import RayLaneClient
from stagemesh.deployments.ingress.lane_view import LaneView
from stagemesh.stages.messages.channel import bind_random_port
from stagemesh.stages.messages.request import (
    EngineRequest,
    LaneError,
    LaneStats,
    RequestSummary,
    TokenBatch,
    TokenDelta,
)

pytestmark = pytest.mark.anyio

ANSWER = list(range(100, 112))
Behaviour = Callable[["Leaders", "Call"], Awaitable[RequestSummary]]


class Call:
    """What `handle.remote` returns: an awaitable that can be cancelled."""

    def __init__(self, leaders: Leaders, request: EngineRequest, behaviour: Behaviour) -> None:
        self.request = request
        lanes = leaders.view.choose(request)
        self.lane = lanes[0] if lanes else ""
        self.cancelled = False
        self._task = asyncio.create_task(behaviour(leaders, self))

    def __await__(self) -> Generator[Any, None, RequestSummary]:
        return self._task.__await__()

    def cancel(self) -> None:
        self.cancelled = True
        self._task.cancel()


class Leaders:
    """Serve's handle. Calls behave as `behaviours` says, the last one for all further calls."""

    def __init__(self, view: LaneView) -> None:
        self.view = view
        self.calls: list[Call] = []
        self.behaviours: list[Behaviour] = [answers]
        self.context = zmq.asyncio.Context()
        self.reports: dict[str, zmq.asyncio.Socket] = {}
        self.silent: set[str] = set()
        self._tokens: zmq.asyncio.Socket | None = None
        self.generate = self
        self.lane_id = self

    def remote(self, *args: Any) -> Any:
        if not args:
            return asyncio.sleep(0, "lane-a")
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        self.calls.append(Call(self, args[0], behaviour))
        return self.calls[-1]

    async def send(self, call: Call, deltas: list[TokenDelta]) -> None:
        if self._tokens is None:
            self._tokens = self.context.socket(zmq.PUSH)
            self._tokens.connect(call.request.reply_to)
        await self._tokens.send(msgspec.msgpack.encode(TokenBatch(call.lane, deltas)))

    async def send_bytes(self, data: bytes) -> None:
        assert self._tokens is not None
        await self._tokens.send(data)

    def add_lane(self, lane: str) -> str:
        socket = self.reports[lane] = self.context.socket(zmq.PUB)
        return bind_random_port(socket, "127.0.0.1")

    async def report(self) -> None:
        """As leaders do, every second: here far more often."""
        while True:
            for lane, socket in list(self.reports.items()):
                if lane not in self.silent:
                    await socket.send(msgspec.msgpack.encode(stats_of(lane)))
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self.context.destroy(linger=0)


def stats_of(lane: str) -> LaneStats:
    counts = dict.fromkeys(
        [name for name in LaneStats.__struct_fields__ if name.startswith(("num", "room", "prefix"))], 0
    )
    rest = ("queued_prefill_tokens", "running_kv_tokens", "prompt_tokens", "generation_tokens", "block_size")
    times = {"schedule_s": 0.0, "step_overhead_s": 0.0, "model_s": 0.0}
    return LaneStats(lane=lane, state="serving", epoch=1, **counts, **dict.fromkeys(rest, 0), **times)


def deltas_of(request: EngineRequest, until: int, attempt: int | None = None) -> list[TokenDelta]:
    """One per token, from where the request begins."""
    first, last = len(request.output_token_ids), len(ANSWER) - 1
    number = request.attempt if attempt is None else attempt
    return [
        TokenDelta(request.request_id, i, [ANSWER[i]], "length" if i == last else None, attempt=number)
        for i in range(first, until)
    ]


async def answers(leaders: Leaders, call: Call) -> RequestSummary:
    await leaders.send(call, deltas_of(call.request, len(ANSWER)))
    return RequestSummary(call.request.request_id, len(ANSWER), "length")


async def dies(leaders: Leaders, call: Call) -> RequestSummary:
    """After three more tokens."""
    await leaders.send(call, deltas_of(call.request, len(call.request.output_token_ids) + 3))
    await asyncio.sleep(0.05)
    raise ray.exceptions.ActorDiedError


async def dies_at_once(leaders: Leaders, call: Call) -> RequestSummary:
    raise ray.exceptions.ActorDiedError


async def hangs(leaders: Leaders, call: Call) -> RequestSummary:
    await leaders.send(call, deltas_of(call.request, len(call.request.output_token_ids) + 2))
    await asyncio.Event().wait()
    raise AssertionError


async def gives_up(leaders: Leaders, call: Call) -> RequestSummary:
    return RequestSummary(call.request.request_id, 5, "abort")


async def loses_tokens(leaders: Leaders, call: Call) -> RequestSummary:
    deltas = deltas_of(call.request, len(ANSWER))
    await leaders.send(call, [*deltas[:2], *deltas[3:]])
    return RequestSummary(call.request.request_id, len(ANSWER), "length")


@pytest.fixture
async def leaders(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Leaders]:
    monkeypatch.setattr(lane_client, "WATCH_PERIOD_S", 0.05)
    monkeypatch.setattr(lane_client, "LAST_TOKENS_TIMEOUT_S", 0.2)
    monkeypatch.setattr(lane_client, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(lane_view, "SILENT_AFTER_S", 0.3)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    leaders = Leaders(LaneView())
    yield leaders
    leaders.view.close()
    leaders.close()


@pytest.fixture
async def client(leaders: Leaders) -> AsyncIterator[RayLaneClient]:
    """Of two lanes that report."""
    client = RayLaneClient(leaders, leaders.view, lane_timeout_s=5.0)
    client.start()
    leaders.view.set_lanes({lane: leaders.add_lane(lane) for lane in ("lane-a", "lane-b")})
    reporting = asyncio.create_task(leaders.report())
    async with asyncio.timeout(5):
        while len(client.lane_stats()) < 2:
            await asyncio.sleep(0.01)
    yield client
    client.close()
    reporting.cancel()
    await asyncio.gather(reporting, *client._loops, *leaders.view.loops, return_exceptions=True)


def request(**fields: Any) -> EngineRequest:
    params = SamplingParams(max_tokens=len(ANSWER), seed=1)
    return EngineRequest("r", [1, 2, 3], params, **fields)


async def tokens_of(client: RayLaneClient) -> list[int]:
    async with asyncio.timeout(10), aclosing(client.generate(request())) as deltas:
        return [token_id async for delta in deltas for token_id in delta.token_ids]


async def test_an_answer_comes_whole(client: RayLaneClient, leaders: Leaders) -> None:
    assert await tokens_of(client) == ANSWER
    assert len(leaders.calls) == 1
    assert not leaders.calls[0].cancelled
    assert not client._inbox.readers


@pytest.mark.parametrize("loss", [dies, dies_at_once, gives_up, loses_tokens], ids=lambda loss: loss.__name__)
async def test_a_lost_lane_is_a_pause(client: RayLaneClient, leaders: Leaders, loss: Behaviour) -> None:
    leaders.behaviours = [loss, loss, answers]
    assert await tokens_of(client) == ANSWER
    assert [call.request.attempt for call in leaders.calls] == [0, 1, 2]
    assert leaders.calls[1].lane != leaders.calls[0].lane, "the lane that lost it is not asked again at once"
    for call in leaders.calls:
        begun = call.request.output_token_ids
        assert begun == ANSWER[: len(begun)]


async def test_a_request_that_every_lane_loses_ends_with_an_error(client: RayLaneClient, leaders: Leaders) -> None:
    leaders.behaviours = [dies_at_once]
    with pytest.raises(LaneError) as error:
        await tokens_of(client)
    assert error.value.status == "lost"
    assert len(leaders.calls) == lane_client.MAX_LOSSES + 1


async def test_what_an_older_attempt_still_sends_is_dropped(client: RayLaneClient, leaders: Leaders) -> None:
    zombie: list[Call] = []

    async def dies_and_goes_on(leaders: Leaders, call: Call) -> RequestSummary:
        zombie.append(call)
        return await dies(leaders, call)

    async def answers_beside_the_zombie(leaders: Leaders, call: Call) -> RequestSummary:
        first = len(call.request.output_token_ids)
        await leaders.send(call, [TokenDelta("r", first, [666], "stop", attempt=0)])
        await leaders.send(zombie[0], [TokenDelta("r", first, [666] * 50, attempt=0)])
        return await answers(leaders, call)

    leaders.behaviours = [dies_and_goes_on, answers_beside_the_zombie]
    assert await tokens_of(client) == ANSWER
    assert client._inbox.num_dropped == 2


async def test_a_silent_lane_loses_its_requests_to_another(client: RayLaneClient, leaders: Leaders) -> None:
    leaders.behaviours = [hangs, answers]
    answer = asyncio.create_task(tokens_of(client))
    while not leaders.calls:
        await asyncio.sleep(0.01)
    silent = leaders.calls[0].lane
    leaders.silent.add(silent)
    assert await answer == ANSWER
    assert leaders.calls[1].lane != silent
    assert leaders.calls[0].cancelled
    assert leaders.view.choose(request()) == [leaders.calls[1].lane], "it gets no further requests"


async def test_the_only_lane_is_waited_for(client: RayLaneClient, leaders: Leaders) -> None:
    leaders.view.set_lanes({"lane-a": leaders.view._addresses["lane-a"]})
    leaders.behaviours = [hangs, answers]
    answer = asyncio.create_task(tokens_of(client))
    while not leaders.calls:
        await asyncio.sleep(0.01)
    leaders.silent.add("lane-a")
    await asyncio.sleep(0.6)
    assert len(leaders.calls) == 1 and not answer.done()
    assert not client.ready()
    leaders.view.set_lanes({"lane-c": leaders.add_lane("lane-c")})
    assert await answer == ANSWER


async def test_a_lane_that_drains_hands_over(client: RayLaneClient, leaders: Leaders) -> None:
    leaders.behaviours = [hangs, answers]
    answer = asyncio.create_task(tokens_of(client))
    while not leaders.calls:
        await asyncio.sleep(0.01)
    addresses = dict(leaders.view._addresses)
    addresses.pop(leaders.calls[0].lane)
    leaders.view.set_lanes(addresses)
    assert await answer == ANSWER
    assert leaders.calls[0].cancelled


async def test_a_client_that_leaves_cancels_the_call(client: RayLaneClient, leaders: Leaders) -> None:
    leaders.behaviours = [hangs]
    async with aclosing(client.generate(request())) as deltas:
        assert (await anext(deltas)).token_ids == ANSWER[:1]
    assert leaders.calls[0].cancelled
    assert not client._inbox.readers


async def test_a_refused_request_is_not_tried_elsewhere(client: RayLaneClient, leaders: Leaders) -> None:
    async def refuses(leaders: Leaders, call: Call) -> RequestSummary:
        return RequestSummary("r", 0, "refused", "prompt=…: too long")

    leaders.behaviours = [refuses]
    with pytest.raises(ConfigError, match="too long"):
        await tokens_of(client)
    assert len(leaders.calls) == 1


async def test_an_error_of_the_request_itself_is_its_answer(client: RayLaneClient, leaders: Leaders) -> None:
    async def fails(leaders: Leaders, call: Call) -> RequestSummary:
        await leaders.send(call, [TokenDelta("r", 0, [], "error", error="no token could be sampled")])
        return RequestSummary("r", 0, "error")

    leaders.behaviours = [fails]
    async with aclosing(client.generate(request())) as deltas:
        delta = await anext(deltas)
    assert (delta.finish_reason, delta.error) == ("error", "no token could be sampled")
    assert len(leaders.calls) == 1


async def test_an_answer_that_nobody_reads_ends_with_an_error(
    client: RayLaneClient, leaders: Leaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_inbox, "MAX_UNREAD_DELTAS", 5)
    async with aclosing(client.generate(request())) as deltas:
        token_ids = (await anext(deltas)).token_ids
        (reader,) = client._inbox.readers.values()
        await asyncio.sleep(0.2)
        assert reader._arrived.qsize() <= 6, "the first five and the error"
        with pytest.raises(LaneError, match="5 pieces of the answer were not read"):
            async for delta in deltas:
                token_ids += delta.token_ids
    assert token_ids == ANSWER[: len(token_ids)] and len(token_ids) < len(ANSWER)


async def test_no_message_ends_the_receive_loop(client: RayLaneClient, leaders: Leaders) -> None:
    assert await tokens_of(client) == ANSWER
    for data in (b"", os.urandom(64), msgspec.msgpack.encode(["lane", 5]), b"\xdd\xff\xff\xff\xff", b"\x91" * 5000):
        await leaders.send_bytes(data)
    await leaders.send_bytes(msgspec.msgpack.encode(TokenBatch("lane", [TokenDelta("nobody", 2**63, [2**64 - 1])])))
    assert await tokens_of(client) == ANSWER
    assert client._inbox.num_dropped >= 6
    client.check_health()
    assert client.ready()


async def test_a_receive_loop_that_ends_makes_the_router_unhealthy(client: RayLaneClient) -> None:
    client._inbox._socket.close(linger=0)
    async with asyncio.timeout(5):
        while client.ready():
            await asyncio.sleep(0.01)
    with pytest.raises(RuntimeError, match="receive loop"):
        client.check_health()

"""Who may wait, and how long: admission, deadlines and priority through the service and both doors."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress import merged as merged_module
from stagemesh.deployments.ingress.admission import RATE_WINDOW_S, Admission, Overloaded
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import GenerationStream, InferenceService
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.requests import CompletionRequest
from stagemesh.stages.messages.request import EngineRequest, LaneError, LaneStats

pytestmark = pytest.mark.anyio

COMPLETION = {"prompt": "Hi", "max_tokens": 30}


@pytest.fixture
def service(lanes, tokenizer, backend, monkeypatch) -> InferenceService:
    """There is room for two requests, and 40 prompt tokens may wait; the lane itself reports none."""
    nothing = {"num_running": 0, "num_waiting": 0, "queued_prefill_tokens": 0, "room": 2}
    report = [msgspec.structs.replace(stats, **nothing) for stats in lanes.lane_stats()]
    monkeypatch.setattr(lanes, "lane_stats", lambda: report)
    size = {"max_model_len": 64, "vocab_size": backend.get_vocab_size()}
    limits = {"max_queued_tokens": 40, "max_request_timeout_s": 20.0}
    return InferenceService(lanes=lanes, tokenizer=tokenizer, model_names=["tiny"], **size, **limits)


@pytest.fixture
async def http(service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def complete(service: InferenceService, **fields: Any) -> GenerationStream:
    return await service.complete(CompletionRequest.parse(COMPLETION | fields))


# ---- the queue


async def test_requests_beyond_the_room_are_refused_until_one_ends(service, lanes):
    first, second = await complete(service), await complete(service)
    with pytest.raises(Overloaded, match="2 requests run or wait, there is room for 2"):
        await complete(service)
    async with aclosing(first.deltas()) as deltas:
        await anext(deltas)
        with pytest.raises(Overloaded):
            service.check_room()
    service.check_room()
    await complete(service)
    await second.collect()


async def test_prompt_tokens_beyond_the_limit_are_refused(service):
    small = await complete(service, prompt=[7] * 10)
    with pytest.raises(Overloaded, match="10 prompt tokens are queued, at most 40 may be"):
        await complete(service, prompt=[7] * 31)
    await complete(service, prompt=[7] * 30)
    assert small.choices


async def test_a_large_request_goes_when_nothing_is_queued(service):
    large = await complete(service, prompt=[7] * 60, n=5)
    with pytest.raises(Overloaded):
        await complete(service)
    await large.collect()
    await complete(service)


async def test_the_prompt_of_a_request_counts_until_its_first_token(service):
    first = await complete(service, prompt=[7] * 35)
    with pytest.raises(Overloaded, match="35 prompt tokens are queued"):
        await complete(service, prompt=[7] * 6)
    async with aclosing(first.deltas()) as deltas:
        await anext(deltas)
        await complete(service, prompt=[7] * 6)


async def test_an_accepted_request_that_nobody_starts_leaves_its_place(service):
    streams = [await complete(service) for _ in range(2)]
    with pytest.raises(Overloaded):
        service.check_room()
    streams.clear()
    gc.collect()
    service.check_room()


async def test_a_request_that_fails_or_is_dropped_leaves_its_place(service, lanes):
    lanes.pause_after = 0
    deltas = (await complete(service, n=2)).deltas()
    waiting = asyncio.create_task(anext(deltas))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await deltas.aclose()
    service.check_room()
    lanes.lose()
    lanes.pause_after = None
    for _ in range(3):
        with pytest.raises(LaneError, match="no lane is running"):
            await (await complete(service)).collect()


async def test_embeddings_queue_too(service, lanes):
    lanes.pause_after = 0
    embedding = asyncio.create_task(service.embed(EmbeddingRequest.parse({"input": ["a", "b", "c"]})))
    while not lanes.running:
        await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await complete(service)
    embedding.cancel()
    await asyncio.gather(embedding, return_exceptions=True)
    assert not lanes.running
    await complete(service)


def stats(**changes: Any) -> LaneStats:
    numbers = {name: 0 for name in LaneStats.__struct_fields__ if not name.startswith("expert")}
    return LaneStats(**(numbers | {"lane": "a", "state": "serving"} | changes))


def requests(*lengths: int) -> list[EngineRequest]:
    return [EngineRequest("r", [1] * length, None) for length in lengths]  # type: ignore[arg-type]


def test_what_other_routers_queued_counts_and_every_lane_adds_room() -> None:
    reports = [stats(num_running=2, num_waiting=1, room=2), stats(room=2)]
    lanes: Any = SimpleNamespace(lane_stats=lambda: reports)
    admission = Admission(lanes, max_requests=2, max_tokens=100)
    places = admission.enter(requests(1))
    with pytest.raises(Overloaded, match="3 requests run or wait, there is room for 4"):
        admission.enter(requests(1, 1))
    reports[:] = [stats(queued_prefill_tokens=195), stats()]
    with pytest.raises(Overloaded, match="195 prompt tokens are queued, at most 200"):
        admission.enter(requests(6))
    reports.clear()
    places += admission.enter(requests(1))
    with pytest.raises(Overloaded, match="2 requests run or wait, there is room for 2"):
        admission.enter(requests(1))
    for place in places:
        place.leave()
        place.leave()
    admission.enter(requests(1, 1, 1))


def test_retry_after_is_the_time_that_the_queue_takes_to_drain() -> None:
    now = 100.0
    report = stats(queued_prefill_tokens=1000, prompt_tokens=0)
    lanes: Any = SimpleNamespace(lane_stats=lambda: [report])
    admission = Admission(lanes, max_requests=2, max_tokens=1000, clock=lambda: now)

    def retry_after() -> int:
        with pytest.raises(Overloaded) as refused:
            admission.check()
        return refused.value.retry_after_s

    assert retry_after() == 1  # no rate yet
    now += RATE_WINDOW_S
    report = stats(queued_prefill_tokens=1000, prompt_tokens=500)  # 100 per second
    assert retry_after() == 10
    report = stats(queued_prefill_tokens=10**6, prompt_tokens=500)
    assert retry_after() == 60
    now += 100 * RATE_WINDOW_S  # a lull says nothing about the rate
    assert retry_after() == 1


async def test_a_refusal_over_http_says_when_to_try_again(http, service, lanes):
    lanes.pause_after = 0
    running = asyncio.create_task(http.post("/v1/completions", json=COMPLETION | {"n": 2}))
    while len(lanes.running) < 2:
        await asyncio.sleep(0)
    for stream in (False, True):
        response = await http.post("/v1/completions", json=COMPLETION | {"stream": stream})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "overloaded"
    assert (await http.post("/v1/embeddings", content=b"not read")).status_code == 429
    lanes.resume.set()
    assert (await running).status_code == 200  # what was accepted finishes
    assert 'stagemesh:requests_refused_total{model_name="tiny"} 3.0' in service.metrics.render().decode()


async def test_refusals_are_cheap(service):
    holding = [await complete(service) for _ in range(2)]
    started = time.process_time()
    for _ in range(200):
        with pytest.raises(Overloaded):
            service.check_room()
    assert (time.process_time() - started) / 200 < 0.001
    assert holding


# ---- deadlines


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("pause_after", [0, 2])
async def test_a_request_ends_at_its_timeout(service, lanes, pause_after, n):
    lanes.pause_after = pause_after
    stream = await complete(service, timeout=0.05, n=n)
    with pytest.raises(LaneError, match=r"did not finish within timeout=0.05 s") as ended:
        await stream.collect()
    assert ended.value.status == "timeout"
    assert not lanes.running and len(lanes.aborted) == n
    service.check_room()


async def test_the_servers_maximum_holds_for_all(lanes, tokenizer, backend):
    size = {"max_model_len": 64, "vocab_size": backend.get_vocab_size()}
    names = {"model_names": ["tiny"], "max_request_timeout_s": 0.05}
    service = InferenceService(lanes=lanes, tokenizer=tokenizer, **size, **names)
    lanes.pause_after = 0
    for fields in ({}, {"timeout": 100.0}):
        with pytest.raises(LaneError, match=r"timeout=0.05 s"):
            await (await complete(service, **fields)).collect()
    with pytest.raises(LaneError, match=r"timeout=0.05 s"):
        await service.embed(EmbeddingRequest.parse({"input": ["a", "b"]}))
    assert not lanes.running


async def test_a_timeout_is_a_408_or_an_event_after_what_came(http, lanes):
    lanes.pause_after = 2
    response = await http.post("/v1/completions", json=COMPLETION | {"timeout": 0.05})
    assert response.status_code == 408
    response = await http.post("/v1/completions", json=COMPLETION | {"timeout": 0.05, "stream": True})
    first, second, error, done, end = response.text.split("\n\n")
    assert (
        '"text"' in first and '"text"' in second and '"code":"timeout"' in error and (done, end) == ("data: [DONE]", "")
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1.5}, "timeout=-1.5"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "5s"}, "timeout='5s'"),
        ({"priority": 101}, r"priority=101: must be within \[-100, 100\]"),
        ({"priority": -101}, "priority=-101"),
        ({"priority": 1.5}, "priority=1.5"),
    ],
)
async def test_a_bad_timeout_or_priority_is_named(service, fields, named):
    with pytest.raises(ConfigError, match=f"^{named}"):
        await complete(service, **fields)
    with pytest.raises(ConfigError, match=f"^{named}"):
        await service.embed(EmbeddingRequest.parse({"input": "a"} | fields))


# ---- what is not read


async def test_many_choices_that_nobody_reads_are_cut_off(service, lanes, monkeypatch):
    monkeypatch.setattr(merged_module, "MAX_UNREAD_DELTAS", 4)
    deltas = (await complete(service, n=3)).deltas()
    await anext(deltas)
    while lanes.running:
        await asyncio.sleep(0)
    with pytest.raises(LaneError, match="4 pieces of the answer were not read"):
        async for _ in deltas:
            pass


async def test_priority_reaches_the_lane(service, lanes, monkeypatch):
    seen = []
    generate = lanes.generate

    def spy(request: EngineRequest) -> Any:
        seen.append(request.priority)
        return generate(request)

    monkeypatch.setattr(lanes, "generate", spy)
    await (await complete(service, priority=-3, n=2)).collect()
    await (await complete(service)).collect()
    assert seen == [-3, -3, 0]


def test_what_runs_and_what_waits_share_the_room() -> None:
    report = stats(num_running=3, room=5)
    lanes: Any = SimpleNamespace(lane_stats=lambda: [report])
    admission = Admission(lanes, max_requests=1, max_tokens=100)
    with pytest.raises(Overloaded, match="3 requests run or wait, there is room for 3"):
        report = stats(num_running=3, room=3)
        admission.check()
    report = stats(num_running=3, room=5)
    places = admission.enter(requests(1, 1, 1, 1, 1, 1))  # more than there is room for, but nothing waits
    with pytest.raises(Overloaded, match="6 requests"):
        admission.check()
    for place in places[:2]:
        place.begin()
        place.begin()
        place.leave()
        place.leave()
    admission.check()

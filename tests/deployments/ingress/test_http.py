from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette

from stagemesh.deployments.ingress import http as http_api
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import MAX_BODY_BYTES
from stagemesh.stages.messages.request import LaneError, TokenDelta

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(service) -> Starlette:
    return build_http_app(service)


@pytest.fixture
async def http(app) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def client(http) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


class Call:
    """One POST straight at the ASGI app: sees every single write, and can leave at any time."""

    def __init__(
        self,
        app: Starlette,
        path: str,
        body: dict[str, Any] | list[bytes],
        *,
        breaks_after: int | None = None,
    ) -> None:
        """The body, also in parts; the connection breaks after so many writes, unnoticed by `receive`."""
        self._body = [json.dumps(body).encode()] if isinstance(body, dict) else body
        self._breaks_after = breaks_after
        self._left = asyncio.Event()
        self.num_parts_read = 0
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "scheme": "http",
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            self.num_parts_read += 1
            return {"type": "http.request", "body": self._body.pop(0), "more_body": bool(self._body)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self.sent.qsize() == self._breaks_after:
            raise OSError("connection closed")
        self.sent.put_nowait(message)

    async def leave(self) -> None:
        """The client closes its connection; returns when the app has noticed."""
        self._left.set()
        await asyncio.wait_for(self.task, 1)


def events(text: str) -> list[Any]:
    """The JSON of every event; the stream must be well-formed and end with [DONE]."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 30}

# ---- the official client


async def test_the_openai_client_completes(client, lanes, tokenizer):
    lanes.num_cached_tokens = 1
    answer = await client.completions.create(model="tiny", prompt="Hi", max_tokens=30)
    assert answer.choices[0].text == lanes.answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(tokenizer.encode("Hi"))
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


async def test_the_openai_client_chats(client, lanes):
    answer = await client.chat.completions.create(**CHAT, n=2, temperature=0)
    assert [choice.message.content for choice in answer.choices] == [lanes.answer] * 2
    assert answer.choices[1].message.role == "assistant"
    assert answer.id.startswith("chatcmpl-")


async def test_the_openai_client_streams_a_completion(client, lanes):
    stream = await client.completions.create(**COMPLETION, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == lanes.answer
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 2


async def test_the_openai_client_streams_a_chat(client, lanes):
    stream = await client.chat.completions.create(**CHAT, stream=True, n=2)
    chunks = [chunk async for chunk in stream]
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == lanes.answer
        assert mine[-1].finish_reason == "stop"
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1)


async def test_the_openai_client_lists_models(client):
    assert [model.id async for model in client.models.list()] == ["tiny", "alias"]
    assert (await client.models.retrieve("alias")).max_model_len == 64
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4")


async def test_the_openai_client_raises_what_the_status_means(client, lanes):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="tiny", prompt="Hi", max_tokens=-1)
    assert refused.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="gpt-4", prompt="Hi")
    lanes.lose()
    with pytest.raises(openai.InternalServerError) as missing:
        await client.chat.completions.create(**CHAT)
    assert missing.value.status_code == 503


async def test_a_failure_in_mid_stream_raises_in_the_openai_client(client, lanes):
    lanes.deltas, lanes.error = [TokenDelta("", 0, [70])], LaneError("lost", "the lane died")
    stream = await client.completions.create(**COMPLETION, stream=True)
    with pytest.raises(openai.APIError, match="the lane died"):
        async for _ in stream:
            pass


# ---- streams


async def test_usage_is_null_in_every_chunk_but_the_last_when_asked_for(http):
    body = COMPLETION | {"stream": True, "stream_options": {"include_usage": True}}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


async def test_without_being_asked_no_chunk_has_usage(http):
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert all("usage" not in chunk for chunk in events(response.text))


async def test_text_is_escaped_in_the_stream(http, lanes):
    lanes.answer = 'a"\n\\ü🙂\u2028\x00'
    response = await http.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response.text)) == lanes.answer


async def test_the_first_token_is_written_before_the_second_exists(app, lanes):
    lanes.pause_after = 1
    call = Call(app, "/v1/completions", COMPLETION | {"stream": True})
    assert (await call.sent.get())["status"] == 200
    first = await call.sent.get()
    assert json.loads(first["body"].removeprefix(b"data: "))["choices"][0]["text"]
    lanes.resume.set()
    await call.task
    assert len(lanes.running) == 0


async def test_a_stream_that_fails_before_its_first_token_has_an_error_status(http, lanes):
    lanes.lose()
    response = await http.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["message"] == "no lane is running"


async def test_a_failure_in_mid_stream_is_an_event_and_the_end(http, lanes):
    lanes.deltas, lanes.error = [TokenDelta("", 0, [70])], LaneError("lost", "the lane died")
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    *_, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"] == {
        "message": "the lane died",
        "type": "server_error",
        "param": None,
        "code": "lane_lost",
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_answer_carries_its_seed_and_the_fingerprint(http, lanes, path):
    body = (COMPLETION if path == "/v1/completions" else CHAT) | {"n": 2}
    answer = (await http.post(path, json=body)).json()
    assert answer["system_fingerprint"] == "fp_test"
    assert [choice["seed"] for choice in answer["choices"]] == [params.seed for _, params, _ in lanes.calls]
    lanes.calls.clear()
    chunks = events((await http.post(path, json=body | {"seed": 2**63 - 1, "stream": True})).text)
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_test"}
    last = {c["index"]: c["seed"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
    assert last == {0: 2**63 - 1, 1: 0}
    assert sum("seed" in c for chunk in chunks for c in chunk["choices"]) == 2
    lanes.calls.clear()
    await http.post(path, json=body | {"seed": last[0], "n": 1})
    assert lanes.calls[0][1].seed == 2**63 - 1


# ---- clients that leave


@pytest.mark.parametrize("pause_after", [0, 2])
@pytest.mark.parametrize("options", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}, {"n": 3}])
async def test_a_client_that_leaves_releases_its_lane_at_once(app, lanes, pause_after, options):
    lanes.pause_after = pause_after
    call = Call(app, "/v1/completions", COMPLETION | options)
    while len(lanes.running) < options.get("n", 1):
        await asyncio.sleep(0)
    await call.leave()
    assert not lanes.running
    assert len(lanes.aborted) == options.get("n", 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_request_releases_its_lane(app, lanes, stream):
    lanes.pause_after = 1
    call = Call(app, "/v1/chat/completions", CHAT | {"stream": stream})
    while not lanes.running:
        await asyncio.sleep(0)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert not lanes.running


async def test_a_broken_connection_releases_the_lane_without_an_alarm(app, lanes, caplog):
    call = Call(app, "/v1/completions", COMPLETION | {"stream": True}, breaks_after=2)
    await call.task
    assert not lanes.running
    assert len(lanes.aborted) == 1
    assert not caplog.records


@pytest.mark.parametrize(("stream", "num_writes"), [(True, 4), (False, 2)])
async def test_a_connection_that_breaks_at_the_last_write_is_no_alarm_either(app, caplog, stream, num_writes):
    body = COMPLETION | {"stream": stream, "max_tokens": 2, "ignore_eos": True}
    whole = Call(app, "/v1/completions", body)
    await whole.task
    assert whole.sent.qsize() == num_writes
    await Call(app, "/v1/completions", body, breaks_after=num_writes - 1).task
    assert not caplog.records


# ---- what is refused


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"hello", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 100_000])
async def test_a_body_that_is_not_json_is_refused(http, path, body):
    response = await http.post(path, content=body)
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"5", b"[]", b"null", b'"x"'])
async def test_a_body_that_is_no_object_is_refused(http, body):
    response = await http.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the body must be a JSON object"


async def test_a_refusal_is_an_openai_error_object(http):
    response = await http.post("/v1/completions", json=COMPLETION | {"temperature": "hot"})
    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": "temperature='hot': input should be a valid number, unable to parse string as a number "
            "(float_parsing)",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        }
    }


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"prompt": "x" * 5000}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 600_000}, 400, "prompt", "context_length_exceeded"),  # parsed on another thread
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": None}, 400, "prompt", None),
        ({"max_tokens": -1}, 400, "max_tokens", None),
        ({"suffix": "end"}, 400, "suffix", None),
    ],
)
async def test_refusals_have_their_status_and_code(http, fields, status, param, code):
    response = await http.post("/v1/completions", json=COMPLETION | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)


async def test_a_missing_field_is_named(http):
    assert (await http.post("/v1/completions", json={})).json()["error"]["param"] == "prompt"
    assert (await http.post("/v1/chat/completions", json={})).json()["error"]["param"] == "messages"


async def test_a_body_beyond_all_limits_of_its_fields_is_refused_by_size(http):
    response = await http.post("/v1/completions", json=COMPLETION | {"prompt": "x" * 4_000_000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "3145728 bytes" in response.json()["error"]["message"]


async def test_a_large_body_is_taken_in_so_that_its_sender_sees_the_answer(app):
    call = Call(app, "/v1/completions", [b"x" * 400_000] * 10)
    await call.task
    assert (await call.sent.get())["status"] == 413
    assert call.num_parts_read == 10


async def test_an_endless_body_is_cut_off(app, monkeypatch):
    monkeypatch.setattr(http_api, "MAX_DISCARDED_BYTES", 1_000_000)
    call = Call(app, "/v1/completions", [b"x" * 400_000] * 12)
    await call.task
    assert (await call.sent.get())["status"] == 413
    assert call.num_parts_read == 11


async def test_the_body_limit_leaves_room_for_as_many_prompts_as_may_come(service):
    service.max_model_len = 1000
    assert service.max_body_bytes >= 1024 * 1000 * len("1234567, ")
    service.max_model_len = 131_072
    assert service.max_body_bytes == MAX_BODY_BYTES


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 404)],
)
async def test_routing_errors_are_openai_error_objects(http, method, path, status):
    response = await http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
async def test_our_own_bugs_answer_500_without_details_and_are_logged_once(http, lanes, caplog, stream):
    lanes.error = ZeroDivisionError("secret")
    with caplog.at_level(logging.WARNING):
        response = await http.post("/v1/completions", json=COMPLETION | {"stream": stream})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info


@pytest.mark.parametrize(
    ("status", "http_status"),
    [("unavailable", 503), ("overloaded", 429), ("lost", 503), ("timeout", 408), ("internal", 500)],
)
async def test_lane_errors_have_their_status(http, lanes, status, http_status):
    lanes.error = LaneError(status, "why")
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == http_status
    assert response.json()["error"]["message"] == "why"


# ---- operations


async def test_health_is_the_process_and_ready_is_a_lane(http, lanes):
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).status_code == 200
    lanes.is_ready = False
    assert (await http.get("/health")).status_code == 200
    response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_lane"


async def test_metrics_have_vllms_names_and_the_lane(http):
    await http.post("/v1/completions", json=COMPLETION)
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    labels = '{lane="lane-a",model_name="tiny"}'
    for name, value in [
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 2),
        ("vllm:kv_cache_usage_perc", 0.25),
        ("vllm:num_preemptions_total", 3),
        ("vllm:prefix_cache_queries_total", 40),
        ("vllm:prefix_cache_hits_total", 30),
        ("vllm:prompt_tokens_total", 50),
        ("vllm:generation_tokens_total", 60),
        ("stagemesh:kv_blocks_free", 75),
        ("stagemesh:kv_blocks_total", 100),
    ]:
        assert f"{name}{labels} {float(value)}" in lines
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in lines
    assert 'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 1.0' in lines

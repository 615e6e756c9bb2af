"""vLLM's routes beside OpenAI's, SageMaker's and KServe's."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

import stagemesh
from stagemesh.deployments.ingress.app import build_http_app

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def http(service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_a_prompt_is_tokenized_and_back(http, tokenizer):
    answer = (await http.post("/tokenize", json={"prompt": "Hello, world", "return_token_strs": True})).json()
    assert answer["tokens"] == tokenizer.encode("Hello, world")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert (answer["max_model_len"], answer["token_strs"][0]) == (64, "<|bos|>")
    text = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert text == {"prompt": "<|bos|>Hello, world"}


@pytest.mark.parametrize("special", [True, False])
async def test_special_tokens_and_the_strings_are_given_when_asked_for(http, tokenizer, special):
    body = {"prompt": "Hi", "add_special_tokens": special}
    answer = (await http.post("/tokenize", json=body)).json()
    assert answer["tokens"] == tokenizer.encode("Hi", add_special_tokens=special)
    assert answer["token_strs"] is None


async def test_messages_are_counted_as_a_chat_sends_them_to_a_lane(http, lanes):
    await http.post("/v1/chat/completions", json={"messages": USER})
    assert (await http.post("/tokenize", json={"messages": USER})).json()["tokens"] == lanes.calls[0][0]
    without = (await http.post("/tokenize", json={"messages": USER, "add_generation_prompt": False})).json()
    assert without["tokens"] == lanes.calls[0][0][:-1]
    special = (await http.post("/tokenize", json={"messages": USER, "add_special_tokens": True})).json()
    assert special["tokens"] == [0, *lanes.calls[0][0]]


async def test_a_prompt_that_does_not_fit_is_counted_all_the_same(http):
    long = "x" * 500
    for body in ({"prompt": long}, {"messages": [{"role": "user", "content": long}]}):
        assert (await http.post("/tokenize", json=body)).json()["count"] > 64


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ("/tokenize", {"messages": [{"role": "judge", "content": ""}]}, 400, "messages"),
        ("/detokenize", {"tokens": [0, 10**6]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [2**80]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
        ("/invocations", {}, 400, "messages"),
        ("/invocations", {"prompt": 5}, 400, "prompt"),
        ("/v1/chat/completions/batch", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions/batch", {"messages": [USER], "stream": True}, 400, "stream"),
        ("/v1/chat/completions/batch", {"messages": [USER], "n": 2}, 400, "n"),
        ("/v1/chat/completions/batch", {"messages": [USER, [{"content": "x"}]]}, 400, "messages[1][0].role"),
        ("/v1/chat/completions/batch", {"messages": [USER, []]}, 400, "messages[1]"),
    ],
)
async def test_what_is_wrong_is_named(http, lanes, path, body, status, param):
    response = await http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert lanes.calls == []


async def test_a_batch_answers_each_conversation_in_its_order(http, lanes):
    body = {"messages": [USER, [{"role": "user", "content": "What?"}]], "temperature": 0, "max_tokens": 3}
    answer = (await http.post("/v1/chat/completions/batch", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens"] == sum(len(prompt) for prompt, _, _ in lanes.calls)


async def test_a_batch_of_which_one_is_refused_leaves_no_place_taken(http, service, lanes):
    for _ in range(300):  # more than there are places
        assert (await http.post("/v1/chat/completions/batch", json={"messages": [USER, []]})).status_code == 400
    assert (await http.post("/v1/chat/completions/batch", json={"messages": [USER, USER]})).status_code == 200


@pytest.mark.parametrize(
    ("body", "object"),
    [
        ({"messages": USER}, "chat.completion"),
        ({"prompt": "Hi"}, "text_completion"),
        ({"input": "Hi"}, "list"),
    ],
)
async def test_an_invocation_is_what_its_body_looks_like(http, body, object):
    assert (await http.post("/invocations", json=body)).json()["object"] == object


async def test_the_service_tells_of_itself(http, lanes):
    assert (await http.get("/version")).json() == {"version": stagemesh.__version__}
    assert (await http.get("/load")).json() == {"server_load": 2}
    assert (await http.get("/ping")).status_code == (await http.post("/ping")).status_code == 200


async def test_kserve_health_follows_the_lanes(http, lanes):
    assert (await http.get("/v2")).json()["name"] == "stagemesh"
    for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/alias/ready"):
        lanes.is_ready = True
        assert (await http.get(path)).json()["ready"] is True
        lanes.is_ready = False
        response = await http.get(path)
        assert (response.status_code, response.json()["ready"]) == (503, False)
    assert (await http.get("/v2/health/live")).json() == {"live": True}
    assert (await http.get("/v2/models/gpt-4/ready")).status_code == 404

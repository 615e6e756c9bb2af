"""The fields of completions, chats and embeddings as vLLM's users know them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import llguidance
import pytest

from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.openai import schema
from stagemesh.stages.messages.request import LaneError, TokenDelta
from stagemesh.stages.messages.step import TokenLogprobs
from stagemesh.stages.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hi"}
PREFIX = [USER, {"role": "assistant", "content": "Well, "}]


@pytest.fixture
async def http(service: InferenceService) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_http_app(service)), base_url="http://test/v1"
    ) as client:
        yield client


def with_settings(lanes: Any, tokenizer: Tokenizer, **settings: Any) -> httpx.AsyncClient:
    size = {"max_model_len": 64, "vocab_size": 300}
    service = InferenceService(lanes=lanes, tokenizer=tokenizer, model_names=["tiny"], **size | settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(build_http_app(service)), base_url="http://test/v1")


async def complete(http: httpx.AsyncClient, **fields: Any) -> Any:
    return (await http.post("/completions", json={"prompt": "Hi", "max_tokens": 30} | fields)).json()


async def chat(http: httpx.AsyncClient, **fields: Any) -> Any:
    return (await http.post("/chat/completions", json={"messages": [USER]} | fields)).json()


async def chunks(http: httpx.AsyncClient, path: str, **fields: Any) -> list[Any]:
    response = await http.post(path, json={"stream": True} | fields)
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], response.text
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def report(token_id: int, logprob: float = -0.5) -> TokenLogprobs:
    return TokenLogprobs(token_id, logprob, 2, [60, token_id], [-0.25, logprob])


def scored(prompt_ids: list[int], answer_ids: list[int]) -> list[TokenDelta]:
    """As a lane answers a request for log-probabilities of prompt and answer."""
    deltas = [TokenDelta("", i, [token], logprobs=[report(token)]) for i, token in enumerate(answer_ids)]
    deltas[0].prompt_logprobs = [report(token, -1.0) for token in prompt_ids[1:]]
    deltas[-1].finish_reason = "length"
    return deltas


# ---- which fields are taken


async def test_an_unknown_field_is_taken_and_warned_of_once(http, caplog, monkeypatch):
    monkeypatch.setattr(schema, "_warned", set())
    body = {"temprature": 0, "length_penalty": 2, "stream": True, "stream_options": {"usage": True}}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await chunks(http, "/completions", prompt="Hi", **body)
        await complete(http, metadata={"a": "b"}, store=False, kv_transfer_params=None)
    fields = [record.args[0] for record in caplog.records]
    assert sorted(fields) == ["length_penalty", "stream_options.usage", "temprature"]


async def test_strict_fields_are_refused_all_at_once(lanes, tokenizer):
    async with with_settings(lanes, tokenizer, strict_fields=True) as http:
        error = (await complete(http, temprature=0, length_penalty=2, store=False, metadata={}))["error"]
        assert "temprature=0: is not a known request field; did you mean temperature?" in error["message"]
        assert "length_penalty=2: is not supported" in error["message"] and "store" not in error["message"]
        stream = await http.post("/completions", json={"prompt": "Hi", "stream": True, "stream_options": {"usage": 1}})
        assert (await chat(http, message=[]))["error"]["message"].endswith("did you mean messages?")
        embedding = await http.post("/embeddings", json={"input": "Hi", "temperature": 0})
    assert stream.json()["error"]["param"] == "stream_options.usage"
    assert embedding.json()["error"]["param"] == "temperature"
    assert not lanes.calls


async def test_numbers_may_be_texts_or_whole_floats_and_no_booleans(http, lanes):
    await complete(http, max_tokens="3", top_k=5.0, temperature="0.5", n=1.0, stop_token_ids=["7"], ignore_eos="true")
    params = lanes.calls[0][1]
    assert (params.max_tokens, params.top_k, params.temperature, params.ignore_eos) == (3, 5, 0.5, True)
    error = (await complete(http, max_tokens=True, seed=1.5))["error"]
    assert "max_tokens=True" in error["message"] and "seed=1.5" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_body_of_another_content_type_is_refused(http, kind):
    response = await http.post("/completions", content=b'{"prompt": "Hi"}', headers={"content-type": kind})
    assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/x+json", ""])
async def test_json_by_another_name_is_taken(http, kind):
    response = await http.post("/completions", content=b'{"prompt": "Hi"}', headers={"content-type": kind})
    assert response.status_code == 200


async def test_the_words_that_clients_look_for(http):
    too_long = (await complete(http, prompt="x" * 300))["error"]
    assert "this model's maximum context length is 64 tokens" in too_long["message"]
    assert too_long["code"] == "context_length_exceeded"
    for fields in ({"prompt": [10**6]}, {"logit_bias": {"5000": 1}}, {"stop_token_ids": [5000]}):
        assert "out of vocabulary" in (await complete(http, **fields))["error"]["message"]


# ---- prompts


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [5, 6, 7]),
        ({"truncate_prompt_tokens": 40}, [5, 6, 7, 8, 9, 10]),
    ],
)
async def test_a_prompt_is_cut(http, lanes, fields, kept):
    await complete(http, prompt=[5, 6, 7, 8, 9, 10], **fields)
    assert lanes.calls[0][0] == kept


async def test_a_prompt_is_cut_to_what_fits_with_its_answer(http, lanes):
    await complete(http, prompt=[5] * 100, truncate_prompt_tokens=-1, max_tokens=20)
    await chat(http, messages=[{"role": "user", "content": "x" * 100}], truncate_prompt_tokens=-1)
    await http.post("/embeddings", json={"input": [5] * 100, "truncate_prompt_tokens": -1})
    assert [len(prompt) for prompt, _, _ in lanes.calls] == [44, 63, 64]


async def test_a_message_goes_on_and_is_echoed(http, lanes, tokenizer):
    fields = {"messages": PREFIX, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = await chat(http, **fields)
    assert tokenizer.decode(lanes.calls[0][0], skip_special_tokens=False) == "<|user|>Hi<|end|><|assistant|>Well, "
    assert answer["choices"][0]["message"]["content"] == "Well, Hello, world"
    parts = await chunks(http, "/chat/completions", **fields)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in parts) == "Well, Hello, world"


async def test_the_template_sees_what_the_request_says(lanes, backend):
    template = "{{ reasoning_effort }} {{ enable_thinking }} {{ documents[0].a }} {{ add_generation_prompt }}"
    async with with_settings(lanes, Tokenizer(backend, chat_template=template)) as http:
        kwargs = {"add_generation_prompt": False}
        await chat(http, reasoning_effort="none", documents=[{"a": "b"}], chat_template_kwargs=kwargs)
        await chat(http, reasoning_effort="low", documents=[{"a": "c"}], chat_template_kwargs={"enable_thinking": 5})
    texts = [backend.decode(prompt) for prompt, _, _ in lanes.calls]
    assert texts == ["none False b False", "low 5 c True"]


async def test_a_trusted_request_brings_its_template(lanes, tokenizer):
    async with with_settings(lanes, tokenizer, trust_request_chat_template=True) as http:
        await chat(http, chat_template="{{ messages[0].content }}!")
        assert (await chat(http, chat_template="{% if"))["error"]["param"] == "chat_template"
    assert tokenizer.decode(lanes.calls[0][0]) == "Hi!"


async def test_allowed_tools_are_the_only_ones(lanes, tokenizer):
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    async with with_settings(lanes, tokenizer, max_model_len=1024) as http:
        await chat(http, tools=tools, tool_choice=choice)
        schema = lanes.calls[0][1].structured_outputs.json_schema
        assert '"g"' in schema and '"f"' not in schema
        allowed["tools"][0]["function"]["name"] = "h"
        assert "'h'" in (await chat(http, tools=tools, tool_choice=choice))["error"]["message"]


async def test_a_conversation_has_a_vector(http, lanes, tokenizer):
    answer = (await http.post("/embeddings", json={"messages": [USER]})).json()
    assert answer["id"].startswith("embd-") and len(answer["data"]) == 1
    assert tokenizer.decode(lanes.calls[0][0], skip_special_tokens=False) == "<|user|>Hi<|end|>"


async def test_dimensions_end_with_the_vector(lanes, tokenizer):
    async with with_settings(lanes, tokenizer, embedding_size=8) as http:
        assert (await http.post("/embeddings", json={"input": "Hi", "dimensions": 8})).status_code == 200
        refused = await http.post("/embeddings", json={"input": "Hi", "dimensions": 9})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"


async def test_a_salt_reaches_the_lanes(service, lanes):
    from stagemesh.deployments.openai.requests import CompletionRequest

    stream = await service.complete(CompletionRequest.parse({"prompt": ["a", "b"], "cache_salt": "s"}))
    assert [choice.request.cache_salt for choice in stream.choices] == ["s", "s"]


async def test_a_thousand_prompts_are_one_request(lanes, tokenizer):
    lanes.lane_stats = lambda: []
    async with with_settings(lanes, tokenizer, max_queued_tokens=10**6, max_num_seqs=16) as http:
        answer = await complete(http, prompt=["a"] * 1024, max_tokens=1)
        assert [choice["index"] for choice in answer["choices"]] == list(range(1024))
        assert (await complete(http, prompt=["a"] * 1025))["error"]["param"] == "prompt"


async def test_a_structural_tag_binds_what_lies_between_its_texts(http, lanes):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    structure = {"begin": "<f=a>", "schema": schema, "end": "</f>"}
    format = {"type": "structural_tag", "structures": [structure], "triggers": ["<f="]}
    await chat(http, response_format=format)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), lanes.calls[0][1].structured_outputs.grammar)
    good, bad = b'Look: <f=a>{"x": 5}</f> and on', b'Look: <f=a>{"x": "five'
    assert matcher.validate_tokens(list(good)) == len(good)
    assert matcher.validate_tokens(list(bad)) == bad.index(b'"five')
    error = (await chat(http, response_format=format | {"triggers": ["<g="]}))["error"]
    assert error["param"] == "response_format.structures[0].begin"


# ---- answers


async def test_echo_scores_a_prompt_as_evaluations_need_it(http, lanes, tokenizer):
    prompt = tokenizer.encode("Hello, world", add_special_tokens=False)
    texts = [tokenizer.decode([token_id]) for token_id in prompt]
    lanes.deltas = scored(prompt, [70])
    (choice,) = (await complete(http, prompt=prompt, max_tokens=1, logprobs=1, echo=True, temperature=0))["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "Hello, world" + tokenizer.decode([70])
    assert found["tokens"] == [*texts, tokenizer.decode([70])]
    assert found["token_logprobs"] == [None, *[-1.0] * (len(prompt) - 1), -0.5]
    assert found["top_logprobs"][0] is None and found["top_logprobs"][1][tokenizer.decode([60])] == -0.25
    assert found["text_offset"] == [len("".join(texts[:i])) for i in range(len(prompt) + 1)]
    assert lanes.calls[0][1].prompt_logprobs == 1


async def test_echo_alone_shows_nothing_of_the_answer(http, lanes, tokenizer):
    prompt = tokenizer.encode("Hello, world")
    for stream in (False, True):
        lanes.deltas = scored(prompt, [70])
        fields = {"prompt": "Hello, world", "max_tokens": 0, "logprobs": 0, "echo": True}
        if stream:
            (part,) = await chunks(http, "/completions", **fields)
            (choice,) = part["choices"]
        else:
            (choice,) = (await complete(http, **fields))["choices"]
        assert choice["text"] == "Hello, world" and len(choice["logprobs"]["tokens"]) == len(prompt)
        # The text does not show <|bos|>: the token behind it starts at 0, too.
        assert choice["logprobs"]["tokens"][0] == "<|bos|>" and choice["logprobs"]["text_offset"][:2] == [0, 0]
        assert choice["logprobs"]["text_offset"][2] == len(choice["logprobs"]["tokens"][1])


async def test_a_streamed_echo_comes_with_the_first_chunk_of_each_choice(http, lanes):
    parts = await chunks(http, "/completions", prompt=["Hi", "Yo"], echo=True, max_tokens=30)
    for index, prompt in enumerate(["Hi", "Yo"]):
        mine = [c["choices"][0]["text"] for c in parts if c["choices"][0]["index"] == index]
        assert mine[0].startswith(prompt) and "".join(mine) == prompt + lanes.answer


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
async def test_the_reason_of_a_stop_is_told(http, lanes, path):
    body = {"prompt": "Hi", "max_tokens": 30} if path == "/completions" else {"messages": [USER]}
    stop_id = lanes.tokenizer.encode(" world", add_special_tokens=False)[0]
    for fields, reason in (({"stop": ["lo"]}, "lo"), ({}, None)):
        answer = (await http.post(path, json=body | fields)).json()
        assert answer["choices"][0]["stop_reason"] == reason
        parts = await chunks(http, path, **body, **fields)
        assert parts[-1]["choices"][0]["stop_reason"] == reason
        assert all(c["choices"][0]["stop_reason"] is None for c in parts[:-1])
    lanes.deltas = [TokenDelta("", 0, [stop_id], "stop", stop_id)]
    answer = (await http.post(path, json=body | {"stop_token_ids": [stop_id]})).json()
    assert answer["choices"][0]["stop_reason"] == stop_id


@pytest.mark.parametrize("asked", [True, False])
async def test_token_ids_come_where_vllm_has_them(http, lanes, asked):
    fields = {"return_token_ids": asked}
    answer = await complete(http, **fields)
    (choice,) = answer["choices"]
    prompt_ids, ids = lanes.calls[0][0], lanes.tokenizer.encode(lanes.answer, add_special_tokens=False) + [lanes.eos]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ((ids, prompt_ids) if asked else (None, None))
    assert choice["prompt_logprobs"] is None and answer["kv_transfer_params"] is None
    parts = [c["choices"][0] for c in await chunks(http, "/completions", prompt="Hi", max_tokens=30, **fields)]
    assert [part["prompt_token_ids"] for part in parts] == [prompt_ids if asked else None] + [None] * (len(ids) - 1)
    assert [part["token_ids"] for part in parts] == [[i] if asked else None for i in ids]
    lanes.calls.clear()
    answer = await chat(http, **fields)
    prompt_ids = lanes.calls[0][0]
    assert answer["prompt_token_ids"] == (prompt_ids if asked else None)
    assert answer["choices"][0]["token_ids"] == (ids if asked else None)
    first, *parts = await chunks(http, "/chat/completions", messages=[USER], **fields)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first.get("prompt_token_ids") == (prompt_ids if asked else None)
    assert not any("prompt_token_ids" in part for part in parts)
    assert first["choices"][0]["token_ids"] == ([] if asked else None)
    assert [part["choices"][0]["token_ids"] for part in parts] == [[i] if asked else None for i in ids]


async def test_tokens_are_named_by_their_ids(http, lanes):
    names = ["token_id:70", "token_id:71"]
    for stream in (False, True):
        lanes.deltas = scored([5], [70, 71])
        fields = {"return_tokens_as_token_ids": True, "stream": stream}
        if stream:
            parts = await chunks(http, "/completions", prompt="Hi", logprobs=1, **fields)
            tokens = [token for part in parts for token in part["choices"][0]["logprobs"]["tokens"]]
        else:
            found = (await complete(http, logprobs=1, **fields))["choices"][0]["logprobs"]
            tokens = found["tokens"]
            assert found["top_logprobs"][0] == {"token_id:60": -0.25, "token_id:70": -0.5}
        assert tokens == names
    lanes.deltas = scored([5], [70, 71])
    answer = await chat(http, logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == names
    assert bytes(content[0]["bytes"]).decode() == lanes.tokenizer.decode([70])
    assert content[0]["top_logprobs"][0]["token"] == "token_id:60"


async def test_logprobs_end_with_the_servers_maximum(lanes, tokenizer):
    async with with_settings(lanes, tokenizer, max_logprobs=3) as http:
        for fields, name in (({"logprobs": 4}, "logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs")):
            assert (await complete(http, **fields))["error"]["param"] == name
        assert (await chat(http, logprobs=True, top_logprobs=4))["error"]["param"] == "top_logprobs"
        assert "choices" in await complete(http, logprobs=3)
    for most in (-1, 300):  # of 300 tokens
        async with with_settings(lanes, tokenizer, max_logprobs=most) as http:
            assert "choices" in await complete(http, logprobs=-1, prompt_logprobs=1000)
        assert (lanes.calls[-1][1].logprobs, lanes.calls[-1][1].prompt_logprobs) == (-1, 1000)


# ---- streams


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
async def test_every_step_has_an_event_also_where_its_text_is_held_back(http, lanes, path):
    ids = lanes.tokenizer.encode("🙂zz", add_special_tokens=False)
    lanes.deltas = [TokenDelta("", i, [token]) for i, token in enumerate(ids)]
    lanes.deltas[-1].finish_reason = "length"
    body = {"prompt": "Hi"} if path == "/completions" else {"messages": [USER]}
    parts = [c["choices"][0] for c in await chunks(http, path, stop=["zzz"], **body)]
    texts = [part["text"] if "text" in part else part["delta"].get("content", "") for part in parts]
    opening = [""] if path != "/completions" else []
    assert texts == [*opening, "", "", "", "🙂", "", "zz"]


async def test_usage_counts_up_where_that_is_asked_for(http, lanes):
    options = {"include_usage": True, "continuous_usage_stats": True}
    parts = await chunks(http, "/chat/completions", messages=[USER], stream_options=options)
    assert [part["usage"]["completion_tokens"] for part in parts] == [0, 1, 2, 3, 4, 4]
    assert parts[-1]["choices"] == [] and len({part["usage"]["prompt_tokens"] for part in parts}) == 1
    for options in ({"continuous_usage_stats": False}, {"continuous_usage_stats": True}):
        parts = await chunks(http, "/completions", prompt="Hi", stream_options=options)
        assert all("usage" not in part for part in parts)


# ---- ids


async def test_the_clients_request_id_is_in_the_answer_and_its_header(http, lanes):
    for _ in range(2):
        response = await http.post("/completions", json={"prompt": "Hi"}, headers={"x-request-id": "abc 1\x7f"})
        assert response.json()["id"] == "cmpl-abc1" and response.headers["x-request-id"] == "abc1"
    (_, _, first), (_, _, second) = lanes.calls
    assert first != second and first.startswith("cmpl-abc1-")
    long = await http.post("/chat/completions", json={"messages": [USER]}, headers={"x-request-id": "a" * 5000})
    assert long.json()["id"] == "chatcmpl-" + "a" * 128
    own = await http.post("/completions", json={"prompt": "Hi", "request_id": "mine"})
    assert own.json()["id"] == "cmpl-mine" and own.headers["x-request-id"] == "mine"
    other = await http.post("/completions", json={"prompt": "Hi"})
    assert other.json()["id"] == "cmpl-" + other.headers["x-request-id"]


async def test_errors_are_logged_with_the_request_id(http, lanes, caplog):
    headers = {"x-request-id": "abc"}
    for error in (LaneError("internal", "why"), ZeroDivisionError()):
        lanes.error = error
        response = await http.post("/completions", json={"prompt": "Hi"}, headers=headers)
        assert response.status_code == 500 and response.headers["x-request-id"] == "abc"
    assert ["request abc" in record.getMessage() for record in caplog.records] == [True, True]


async def test_model_entries_have_vllms_keys(lanes, tokenizer):
    async with with_settings(lanes, tokenizer, model_root="/models/x") as http:
        (card,) = (await http.get("/models")).json()["data"]
    assert (card["root"], card["parent"], card["max_model_len"]) == ("/models/x", None, 64)
    assert card["permission"][0]["allow_sampling"] is True

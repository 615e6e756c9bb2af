"""Responses and Messages, worked by the official clients; and what a stream's events are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.stages.messages.request import LaneError, TokenDelta
from stagemesh.stages.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
IN_WORDS = f"\n{CALL}<|end|><|user|><tool_response>\n2\n</tool_response>".replace(">{", ">\n{").replace("}</", "}\n</")
"""A call and its result for a template that knows neither."""
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}<|assistant|>"
)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"type": "function", "name": "add", "parameters": PARAMETERS}
TOOL = {"name": "add", "description": "Adds.", "input_schema": PARAMETERS}
USER: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def service(lanes, tokenizer, backend) -> InferenceService:
    return InferenceService(
        lanes=lanes,
        tokenizer=Tokenizer(backend, chat_template=TEMPLATE),
        model_names=["tiny", "alias"],
        max_model_len=1024,
        vocab_size=backend.get_vocab_size(),
    )


@pytest.fixture
async def http(service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def gpt(http) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)


@pytest.fixture
async def claude(service) -> AsyncIterator[anthropic.AsyncAnthropic]:
    transport = httpx2.ASGITransport(build_http_app(service))
    async with httpx2.AsyncClient(transport=transport) as client:
        yield anthropic.AsyncAnthropic(base_url="http://test", api_key="none", http_client=client, max_retries=0)


def prompt_of(lanes: Any) -> str:
    text: str = lanes.tokenizer.decode(lanes.calls[-1][0], skip_special_tokens=False)
    return text


def written(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types."""
    events = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


# ---- OpenAI's Responses


async def test_openai_creates_a_response(gpt, lanes):
    lanes.num_cached_tokens = 2
    answer = await gpt.responses.create(
        model="tiny", instructions="Be brief.", input="Hi", temperature=0.5, max_output_tokens=50, metadata={"a": "b"}
    )
    assert (answer.output_text, answer.status, answer.error) == (lanes.answer, "completed", None)
    assert (answer.temperature, answer.max_output_tokens, answer.metadata) == (0.5, 50, {"a": "b"})
    assert answer.usage.input_tokens == len(lanes.calls[0][0])
    assert answer.usage.input_tokens_details.cached_tokens == 2
    assert prompt_of(lanes) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"


async def test_a_conversation_of_items_becomes_messages(gpt, lanes):
    await gpt.responses.create(
        model="tiny",
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "No jokes."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
        ],
        tools=[FUNCTION],
    )
    system, _, rest = prompt_of(lanes).partition("<|end|>")
    assert system.startswith("<|system|>Be brief.\nNo jokes.") and '"name": "add"' in system
    assert rest == f"<|user|>1?<|end|><|assistant|>so{IN_WORDS}<|end|><|assistant|>"


async def test_openai_streams_a_response(gpt, lanes):
    async with gpt.responses.stream(model="tiny", input="Hi") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == lanes.answer
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == lanes.answer
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_the_events_of_a_response_come_in_order(http, lanes):
    lanes.answer = "So " + CALL
    body = {"input": "Hi", "tools": [FUNCTION], "stream": True}
    events = written((await http.post("/v1/responses", json=body)).text)
    names = [event["type"].removeprefix("response.") for event in events]
    assert list(dict.fromkeys(names)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "function_call_arguments.delta", "function_call_arguments.done",
        "completed",
    ]  # fmt: skip
    assert [event["output_index"] for event in events if event["type"].endswith("item.added")] == [0, 1]
    response = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert response["output"] == done
    assert (done[1]["name"], json.loads(done[1]["arguments"]), done[1]["status"]) == ("add", {"a": 1}, "completed")
    assert done[0]["content"][0]["text"] == "So"
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"] for item in done}
    assert response["usage"]["output_tokens"] == len(lanes.tokenizer.encode(lanes.answer, add_special_tokens=False)) + 1


async def test_openai_gets_calls_and_a_forced_choice(gpt, lanes):
    lanes.answer = CALL
    answer = await gpt.responses.create(model="tiny", input="Hi", tools=[FUNCTION, {"type": "web_search"}])
    (call,) = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 1})
    lanes.answer = '{"a": 5}'
    named: Any = {"type": "function", "name": "add"}
    answer = await gpt.responses.create(model="tiny", input="Hi", tools=[FUNCTION], tool_choice=named)
    assert (answer.output[0].name, answer.output[0].arguments) == ("add", '{"a": 5}')
    assert lanes.calls[-1][1].structured_outputs.json == PARAMETERS


async def test_a_response_may_have_a_schema(gpt, lanes):
    format: Any = {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}
    await gpt.responses.create(model="tiny", input="Hi", text={"format": format})
    assert lanes.calls[0][1].structured_outputs.json == PARAMETERS


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_was_cut_is_incomplete(http, stream):
    response = await http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2, "stream": stream})
    answer = written(response.text)[-1]["response"] if stream else response.json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    if stream:
        assert written(response.text)[-1]["type"] == "response.incomplete"


async def test_a_response_that_fails_in_mid_stream_says_so(http, lanes):
    lanes.deltas, lanes.error = [TokenDelta("", 0, [70])], LaneError("lost", "the lane died")
    events = written((await http.post("/v1/responses", json={"input": "Hi", "stream": True})).text)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "the lane died"}


# ---- Anthropic's Messages


async def test_anthropic_creates_a_message(claude, lanes):
    lanes.num_cached_tokens = 2
    answer = await claude.messages.create(model="alias", max_tokens=50, system="Be brief.", messages=USER)
    assert (answer.content[0].text, answer.stop_reason, answer.model) == (lanes.answer, "end_turn", "alias")
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == len(lanes.calls[0][0])
    assert answer.usage.output_tokens == len(lanes.tokenizer.encode(lanes.answer, add_special_tokens=False)) + 1
    count = await claude.messages.count_tokens(model="tiny", system="Be brief.", messages=USER)
    assert count.input_tokens == len(lanes.calls[0][0])


async def test_anthropic_streams_a_message(claude, lanes):
    async with claude.messages.stream(model="tiny", max_tokens=50, messages=USER) as stream:
        assert "".join([text async for text in stream.text_stream]) == lanes.answer
        final = await stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (lanes.answer, "end_turn")
    assert final.usage.output_tokens > 2


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropic_uses_a_tool_and_returns_its_result(claude, lanes, stream):
    lanes.answer = "So " + CALL
    body: Any = {"model": "tiny", "max_tokens": 90, "messages": USER, "tools": [TOOL]}
    if stream:
        async with claude.messages.stream(**body) as events:
            answer = await events.get_final_message()
    else:
        answer = await claude.messages.create(**body)
    text, use = answer.content
    assert (text.text, use.name, use.input, answer.stop_reason) == ("So", "add", {"a": 1}, "tool_use")
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "2"}]}
    body["messages"] = [
        *USER,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "go on"}]},
    ]
    await claude.messages.create(**body)
    system, _, rest = prompt_of(lanes).partition("<|end|>")
    assert system.startswith("<|system|>") and '"name": "add"' in system  # this template knows no tools
    assert rest == f"<|user|>Hi<|end|><|assistant|>So{IN_WORDS}<|end|><|user|>go on<|end|><|assistant|>"


async def test_the_events_of_a_message_come_in_order(http, lanes):
    lanes.answer = CALL
    body = {"model": "tiny", "max_tokens": 90, "messages": USER, "tools": [TOOL], "stream": True}
    events = written((await http.post("/v1/messages", json=body)).text)
    assert list(dict.fromkeys(event["type"] for event in events)) == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    assert events[2]["content_block"]["input"] == {}
    parts = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(parts)) == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [({"max_tokens": 2}, "max_tokens", None), ({"stop_sequences": ["wor"]}, "stop_sequence", "wor")],
)
async def test_a_message_says_why_it_stopped(http, fields, reason, sequence):
    body = {"model": "tiny", "max_tokens": 50, "messages": USER, **fields}
    answer = (await http.post("/v1/messages", json=body)).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    events = written((await http.post("/v1/messages", json=body | {"stream": True})).text)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


async def test_errors_are_anthropics(claude, http, lanes):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await claude.messages.create(model="tiny", max_tokens=-1, messages=USER)
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(model="gpt", max_tokens=5, messages=USER)
    answer = await http.post("/v1/messages", json={"model": "tiny", "max_tokens": 5, "messages": [{"role": "x"}]})
    assert answer.json() == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "messages[0].role='x': must be user or assistant",
        },
    }
    assert (
        (await http.get("/v1/messages")).json()["type"] == (await http.get("/v1/messages/x")).json()["type"] == "error"
    )
    lanes.deltas, lanes.error = [TokenDelta("", 0, [70])], LaneError("lost", "the lane died")
    body = {"model": "tiny", "max_tokens": 5, "messages": USER, "stream": True}
    events = written((await http.post("/v1/messages", json=body)).text)
    assert events[-1] == {"type": "error", "error": {"type": "overloaded_error", "message": "the lane died"}}


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"background": True}, "background"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ("/v1/responses", {"max_output_tokens": 0}, "max_output_tokens"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ("/v1/responses", {"tool_choice": "required"}, "tool_choice"),
        ("/v1/messages", {"stop_sequences": ["a"] * 99}, "stop_sequences"),
        ("/v1/messages", {"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ("/v1/messages", {"tool_choice": {"type": "odd"}}, "tool_choice.type"),
        ("/v1/messages", {"messages": [*USER, {"role": "assistant", "content": "I"}]}, "messages[1].role"),
        ("/v1/messages", {"model": None}, "model"),
        ("/v1/messages/count_tokens", {"system": 5}, "system"),
    ],
)
async def test_what_is_wrong_is_named(http, lanes, path, fields, name):
    body = {"model": "tiny", "input": "Hi"} if "responses" in path else {"model": "tiny", "messages": USER}
    if path == "/v1/messages":
        body["max_tokens"] = 5
    response = await http.post(path, json=body | fields)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{name}=")
    assert lanes.calls == []


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["message", "function_call", "function_call_output", "text", "input_text", "tool_use", "user",
                       "tool_result", "assistant", "function", "auto", "json_schema", "allowed_tools", "add", "tool"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "name", "call_id", "id", "arguments", "output", "input",
                         "format", "schema", "tool_use_id", "tools", "mode", "input_schema", "description"]),
        inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
FIELDS = {
    "/v1/responses": ["input", "instructions", "tools", "tool_choice", "text", "max_output_tokens", "temperature",
                      "metadata", "parallel_tool_calls", "stream", "top_k", "stop", "chat_template_kwargs",
                      "reasoning"],
    "/v1/messages": ["messages", "system", "tools", "tool_choice", "max_tokens", "stop_sequences", "top_k", "stream",
                     "output_config", "thinking", "model", "metadata"],
    "/v1/messages/count_tokens": ["messages", "system", "tools", "tool_choice"],
    "/v1/chat/completions/batch": ["messages", "stream", "tools", "n", "max_tokens", "response_format"],
    "/tokenize": ["prompt", "messages", "add_special_tokens", "tools", "chat_template_kwargs", "return_token_strs"],
    "/detokenize": ["tokens"],
    "/invocations": ["messages", "prompt", "input"],
}  # fmt: skip
VALID: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "messages": USER, "input": "Hi", "tools": [FUNCTION]}


@pytest.mark.parametrize("path", FIELDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_junk_in_any_field_is_a_bug(service, path, data):
    junk = st.one_of(
        JUNK, st.lists(st.dictionaries(st.sampled_from(["type", "role", "content", "name"]), JUNK), max_size=2)
    )
    fields = data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), junk, min_size=1, max_size=3))
    kept = {name: VALID[name] for name in FIELDS[path] if name in VALID and data.draw(st.booleans())}

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(build_http_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=json.dumps({"model": "tiny", **kept, **fields}))

    with ThreadPoolExecutor(1) as pool:  # this thread may have a loop of its own
        response = pool.submit(asyncio.run, post()).result()
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
        assert (response.json().get("type") == "error") is path.startswith("/v1/messages")

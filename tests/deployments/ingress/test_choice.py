"""Log-probabilities, structured outputs and tool calls through both doors."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import openai
import pytest

from stagemesh.config.sampling import StructuredOutputsParams
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.grpc import GrpcApi
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.stages.messages.request import TokenDelta
from stagemesh.stages.messages.step import TokenLogprobs
from stagemesh.stages.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% if tools %}<|system|>Call tools within <tool_call></tool_call>: "
    "{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}:{{ call.function.arguments.city }}{% endfor %}"
    "<|end|>{% endfor %}<|assistant|>"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": PARAMETERS}}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture
def service(lanes, backend) -> InferenceService:
    return InferenceService(
        lanes=lanes,
        tokenizer=Tokenizer(backend, chat_template=TEMPLATE),
        model_names=["tiny"],
        max_model_len=700,
        vocab_size=backend.get_vocab_size(),
    )


@pytest.fixture
async def client(service) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(build_http_app(service)), base_url="http://test")
    async with http, openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http) as client:
        yield client


class Context:
    """A gRPC context that fails the test when the call fails."""

    def set_code(self, code: grpc.StatusCode) -> None:
        raise AssertionError(code)

    def set_details(self, details: str) -> None:
        raise AssertionError(details)


@pytest.fixture
def grpc_api(service) -> GrpcApi:
    api = GrpcApi()
    api.inference_service = service
    return api


def logprobs_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 2, [60, token_id], [-0.25, -0.5])


def with_logprobs(tokenizer: Tokenizer, text: str) -> list[TokenDelta]:
    """The answer token by token, then its end."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = [TokenDelta("", i, [token], logprobs=[logprobs_of(token)]) for i, token in enumerate(token_ids)]
    deltas[0].prompt_logprobs = [logprobs_of(70), TokenLogprobs(71, -math.inf, 9, [60], [-0.1])]
    deltas[-1].finish_reason = "length"
    return deltas


# ---- log-probabilities


async def test_completions_report_logprobs_in_openais_lists(client, lanes, tokenizer):
    lanes.deltas = with_logprobs(tokenizer, "zäx")
    answer = await client.completions.create(model="tiny", prompt="Hi", logprobs=2, max_tokens=30)
    report = answer.choices[0].logprobs
    assert report.tokens == ["z", "\ufffd", "\ufffd", "x"]
    assert report.token_logprobs == [-0.5] * 4
    assert report.text_offset == [0, 1, 2, 3]
    assert report.top_logprobs[0] == {tokenizer.decode([60]): -0.25, "z": -0.5}
    assert lanes.calls[0][1].logprobs == 2


async def test_chats_report_logprobs_with_bytes(client, lanes, tokenizer):
    lanes.deltas = with_logprobs(tokenizer, "zä")
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries) == "zä".encode()
    assert [top.logprob for top in entries[0].top_logprobs] == [-0.25, -0.5]
    assert entries[0].logprob == -0.5


async def test_streams_report_logprobs_of_every_token_once(client, lanes, tokenizer):
    lanes.deltas = with_logprobs(tokenizer, "zäx Hello")
    chat = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, stream=True)
    found = [e.token for chunk in [c async for c in chat] for e in (chunk.choices[0].logprobs or _NONE).content]
    lanes.deltas = with_logprobs(tokenizer, "zäx Hello")
    stream = await client.completions.create(model="tiny", prompt="Hi", logprobs=0, stream=True)
    lists = [chunk.choices[0].logprobs for chunk in [c async for c in stream] if chunk.choices[0].logprobs]
    assert [token for report in lists for token in report.tokens] == found
    offsets = [offset for report in lists for offset in report.text_offset]
    assert offsets == sorted(set(offsets)) and len(offsets) == len(found)


class _NONE:
    content: list[Any] = []


async def test_nobody_who_did_not_ask_gets_logprobs(client, lanes):
    answer = await client.completions.create(model="tiny", prompt="Hi", max_tokens=30)
    assert answer.choices[0].logprobs is None and answer.choices[0].prompt_logprobs is None


async def test_logprobs_end_with_the_token_that_completed_a_stop_string(client, lanes, tokenizer):
    lanes.deltas = with_logprobs(tokenizer, "zxq")
    lanes.deltas[1].token_ids += lanes.deltas[2].token_ids
    lanes.deltas[1].logprobs += lanes.deltas[2].logprobs
    answer = await client.completions.create(model="tiny", prompt="Hi", logprobs=0, stop=["x"], max_tokens=30)
    assert answer.choices[0].text == "z"
    assert answer.choices[0].logprobs.tokens == ["z", "x"] and answer.usage.completion_tokens == 2


async def test_prompt_logprobs_come_by_token_id_with_null_for_the_first(client, lanes, tokenizer):
    lanes.deltas = with_logprobs(tokenizer, "z")
    body = {"prompt_logprobs": 2}
    answer = await client.completions.create(model="tiny", prompt=[5, 70, 71], max_tokens=30, extra_body=body)
    first, second, third = answer.choices[0].prompt_logprobs
    assert first is None
    assert {token_id: (e["logprob"], e["rank"]) for token_id, e in second.items()} == {
        "60": (-0.25, 1),
        "70": (-0.5, 2),
    }
    assert third["71"] == {"logprob": -9999.0, "rank": 9, "decoded_token": tokenizer.decode([71])}
    lanes.deltas = with_logprobs(tokenizer, "z")
    chat = await client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body)
    assert len(chat.prompt_logprobs) == 3


async def test_grpc_reports_logprobs(grpc_api, lanes, tokenizer):
    lanes.deltas = with_logprobs(tokenizer, "zä")
    sampling = pb.Sampling(logprobs=2, prompt_logprobs=1, max_tokens=9)
    (choice,) = (await grpc_api.Generate(pb.GenerateRequest(text="Hi", sampling=sampling), Context())).choices
    assert b"".join(entry.text for entry in choice.logprobs) == "zä".encode()
    assert [top.logprob for top in choice.logprobs[0].top] == [-0.25, -0.5] and choice.logprobs[0].rank == 2
    assert [entry.token_id for entry in choice.prompt_logprobs] == [70, 71]
    lanes.deltas = with_logprobs(tokenizer, "zä")
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")], sampling=pb.Sampling(logprobs=0))
    chunks = [chunk async for chunk in grpc_api.ChatStream(request, Context())]
    assert sum(len(chunk.logprobs) for chunk in chunks) == 3


# ---- what shapes the text


@pytest.mark.parametrize("keeps, expected", [(True, "Hello, w"), (False, "Hello, ")])
async def test_a_stop_string_is_part_of_the_text_if_asked_for(client, lanes, keeps, expected):
    body = {"include_stop_str_in_output": keeps}
    answer = await client.completions.create(model="tiny", prompt="Hi", stop=["w"], max_tokens=30, extra_body=body)
    assert answer.choices[0].text == expected


@pytest.mark.parametrize("keeps, expected", [(True, "zx"), (False, "z")])
async def test_a_stop_token_is_part_of_the_text_if_asked_for(client, lanes, tokenizer, keeps, expected):
    z, x = tokenizer.encode("zx", add_special_tokens=False)
    lanes.deltas = [TokenDelta("", 0, [z]), TokenDelta("", 1, [x], "stop", x)]
    body = {"include_stop_str_in_output": keeps, "stop_token_ids": [x]}
    answer = await client.completions.create(model="tiny", prompt="Hi", max_tokens=30, extra_body=body)
    assert answer.choices[0].text == expected


async def test_special_tokens_are_shown_if_asked_for(client, lanes):
    body = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    answer = await client.completions.create(model="tiny", prompt="Hi", max_tokens=30, extra_body=body)
    assert answer.choices[0].text == "Hello, world<|end|>"


async def test_bad_words_reach_the_lane_as_token_ids(client, lanes, tokenizer):
    await client.completions.create(model="tiny", prompt="Hi", max_tokens=30, extra_body={"bad_words": ["zx"]})
    params = lanes.calls[0][1]
    assert params.bad_words == ("zx",)
    assert params.bad_words_token_ids[0] == tuple(tokenizer.encode("zx", add_special_tokens=False))


async def test_penalties_and_biases_reach_the_lane_through_both_doors(client, grpc_api, lanes):
    given = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -3.0}}
    more = {"repetition_penalty": 1.25, "allowed_token_ids": [7, 8]}
    await client.completions.create(model="tiny", prompt="Hi", max_tokens=30, **given, extra_body=more)
    sampling = pb.Sampling(**{**given, "logit_bias": {7: -3.0}}, **more)
    await grpc_api.Generate(pb.GenerateRequest(text="Hi", sampling=sampling), Context())
    for _, params, _ in lanes.calls:
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.25)
        assert (params.logit_bias, params.allowed_token_ids) == ({7: -3.0}, (7, 8))


# ---- structured outputs


@pytest.mark.parametrize(
    "fields, form",
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PARAMETERS}}},
            {"json": PARAMETERS},
        ),
        ({"structured_outputs": {"json": PARAMETERS}}, {"json": PARAMETERS}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"grammar": 'root ::= "a"'}),
    ],
)
async def test_the_form_of_an_answer_reaches_the_lane(client, lanes, fields, form):
    await client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=fields)
    assert lanes.calls[0][1].structured_outputs == StructuredOutputsParams(**form)


@pytest.mark.parametrize(
    "given, form",
    [
        (pb.StructuredOutputs(json=json.dumps(PARAMETERS)), {"json": json.dumps(PARAMETERS)}),
        (pb.StructuredOutputs(regex="a+"), {"regex": "a+"}),
        (pb.StructuredOutputs(choice=pb.Texts(texts=["a", "b"])), {"choice": ("a", "b")}),
        (pb.StructuredOutputs(json_object=True), {"json_object": True}),
    ],
)
async def test_grpc_asks_for_a_form_too(grpc_api, lanes, given, form):
    request = pb.GenerateRequest(text="Hi", sampling=pb.Sampling(structured_outputs=given))
    await grpc_api.Generate(request, Context())
    assert lanes.calls[0][1].structured_outputs == StructuredOutputsParams(**form)


# ---- tools


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> tuple[str, list[dict[str, str]], str | None]:
    """Content, calls and finish reason, put together from the deltas as OpenAI's own clients do it."""
    content, calls, reason = "", [], None
    async for chunk in await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            calls[delta.index]["arguments"] += delta.function.arguments
    return content, calls, reason


async def test_a_free_answer_may_call_a_tool(client, lanes, tokenizer):
    lanes.answer = "Let me look.\n" + CALL
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", '{"city": "Köln"}')
    prompt = tokenizer.decode(lanes.calls[0][0], skip_special_tokens=False)
    assert '"name": "weather"' in prompt and lanes.calls[0][1].structured_outputs is None


async def test_calls_are_streamed_in_openais_deltas(client, lanes):
    lanes.answer = f"Look: {CALL}\n{CALL}"
    content, calls, reason = await streamed(client, tools=[TOOL])
    assert (content, reason) == ("Look:", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", '{"city": "Köln"}')] * 2
    assert len({call["id"] for call in calls}) == 2


async def test_an_answer_without_calls_is_text(client, lanes):
    assert await streamed(client, tools=[TOOL]) == (lanes.answer, [], "stop")
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL])
    assert answer.choices[0].message.content == lanes.answer and answer.choices[0].message.tool_calls is None


async def test_tool_choice_none_hides_the_tools_and_leaves_the_text_alone(client, lanes, tokenizer):
    lanes.answer = CALL
    content, calls, reason = await streamed(client, tools=[TOOL], tool_choice="none")
    assert (content, calls, reason) == (CALL, [], "stop")
    assert "weather" not in tokenizer.decode(lanes.calls[0][0])


async def test_a_required_call_is_generated_under_a_schema(client, lanes):
    lanes.answer = '[{"name": "weather", "parameters": {"city": "Köln"}}]'
    content, calls, reason = await streamed(client, tools=[TOOL], tool_choice="required")
    assert (content, reason) == ("", "tool_calls")
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", '{"city": "Köln"}')]
    schema = json.loads(lanes.calls[0][1].structured_outputs.json_schema)
    assert schema["items"]["anyOf"][0]["properties"]["parameters"] == PARAMETERS


async def test_a_named_function_is_called_with_the_whole_answer(client, lanes):
    lanes.answer = '{"city": "Köln"}'
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    content, calls, reason = await streamed(client, tools=[TOOL], tool_choice=choice)
    assert (content, reason) == ("", "stop")
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", lanes.answer)]
    assert lanes.calls[0][1].structured_outputs == StructuredOutputsParams(json=PARAMETERS)


async def test_the_conversation_may_hold_calls_and_their_results(client, lanes, tokenizer):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await client.chat.completions.create(model="tiny", messages=messages)
    prompt = tokenizer.decode(lanes.calls[0][0], skip_special_tokens=False)
    assert "<|assistant|>weather:Bonn<|end|><|tool|>sunny<|end|>" in prompt


async def test_each_of_n_answers_has_its_own_calls(client, lanes):
    lanes.answer = CALL
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL], n=2)
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [1, 1]


async def test_grpc_calls_tools(grpc_api, lanes):
    lanes.answer = CALL
    tool = pb.Tool(name="weather", parameters=json.dumps(PARAMETERS))
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")], tools=[tool])
    (choice,) = (await grpc_api.Chat(request, Context())).choices
    assert choice.finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in choice.message.tool_calls] == [("weather", '{"city": "Köln"}')]
    chunks = [chunk async for chunk in grpc_api.ChatStream(request, Context())]
    deltas = [call for chunk in chunks for call in chunk.tool_calls]
    assert "".join(delta.arguments for delta in deltas) == '{"city": "Köln"}' and deltas[0].name == "weather"
    lanes.answer = '{"city": "Köln"}'
    named = pb.ChatRequest(messages=request.messages, tools=[tool], tool_choice="weather")
    (choice,) = (await grpc_api.Chat(named, Context())).choices
    assert choice.message.tool_calls[0].arguments == lanes.answer

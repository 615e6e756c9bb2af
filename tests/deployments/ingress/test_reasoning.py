"""Reasoning through HTTP and gRPC."""

from __future__ import annotations

import httpx
import openai
import pytest

from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.grpc import GrpcApi
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.proto import inference_pb2 as pb

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "Hi"}]
THOUGHT = "<think>\nA greeting.\n</think>"


@pytest.fixture
async def client(lanes, tokenizer, backend):
    service = InferenceService(
        lanes=lanes,
        tokenizer=tokenizer,
        model_names=["tiny"],
        max_model_len=200,
        vocab_size=backend.get_vocab_size(),
        reasoning_parser="qwen3",
    )
    lanes.answer = THOUGHT + "\n\nHello."
    http = httpx.AsyncClient(transport=httpx.ASGITransport(build_http_app(service)), base_url="http://test")
    async with http, openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http) as client:
        client.service = service
        yield client


async def test_a_whole_answer_has_its_reasoning_apart(client, tokenizer):
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
    message = answer.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("Hello.", "A greeting.", "A greeting.")
    num_tokens = len(tokenizer.encode(THOUGHT, add_special_tokens=False))
    assert abs(answer.usage.completion_tokens_details.reasoning_tokens - num_tokens) <= 1


async def test_reasoning_is_streamed_before_the_content(client):
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "A greeting."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "A greeting."
    assert "".join(delta.content or "" for delta in deltas) == "Hello."
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 0


async def test_without_thinking_all_is_content(client, lanes):
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    assert answer.choices[0].message.content == lanes.answer
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


async def test_an_answer_that_is_cut_off_while_it_thinks_has_no_content(client, lanes):
    lanes.answer = "<think>Hm"
    message = (await client.chat.completions.create(model="tiny", messages=MESSAGES)).choices[0].message
    assert (message.content, message.reasoning) == (None, "Hm")


async def test_grpc_has_reasoning_in_a_field_of_its_own(client):
    api = GrpcApi()
    api.inference_service = client.service
    request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")])
    answer = await api.Chat(request, None)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.reasoning) == ("Hello.", "A greeting.")
    assert answer.usage.reasoning_tokens > 0
    chunks = [chunk async for chunk in api.ChatStream(request, None)]
    assert "".join(chunk.reasoning for chunk in chunks) == "A greeting."
    assert "".join(chunk.content for chunk in chunks) == "Hello."

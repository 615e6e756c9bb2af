"""What stagemesh.v1 has beside text, and what all its errors and calls share."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import stagemesh
from stagemesh.deployments.ingress.admission import Overloaded
from stagemesh.deployments.ingress.grpc_rpc import MAX_MESSAGE_BYTES, CallAborted, Calls, Rpcs
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.deployments.proto import inference_pb2_grpc

pytestmark = pytest.mark.anyio


@pytest.fixture
def stub(channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture(autouse=True)
def no_call_is_left() -> Any:
    yield
    assert not Rpcs.calls._by_id


def prompt(text: str = "Hi", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, **fields)


async def running(lanes: Any, count: int) -> None:
    """Until so many sequences run; fails after a second."""
    async with asyncio.timeout(1):
        while len(lanes.running) != count:
            await asyncio.sleep(0.001)


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return status


def violation(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    bad = error_details_pb2.BadRequest()
    assert details(error).details[0].Unpack(bad)
    [field] = bad.field_violations
    return field.field, field.description


# ---- errors


@pytest.mark.parametrize(
    ("rpc", "request_", "field", "description"),
    [
        ("Generate", prompt(sampling=pb.Sampling(top_p=2)), "sampling.top_p", "[0, 1]"),
        ("Generate", prompt(model="gpt-4"), "model", "is not served here"),
        ("Chat", pb.ChatRequest(), "messages", "at least one"),
        ("Generate", prompt(request_id="x" * 129), "request_id", "128 characters"),
        ("Generate", prompt("x" * 5000), "prompt", "64"),
        ("Embed", pb.EmbedRequest(), "input", "is required"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1, 2**32 - 1]), "token_ids[1]", "out of vocabulary"),
        ("Tokenize", pb.TokenizeRequest(), "text", "is required"),
        ("ModelInfo", pb.ModelInfoRequest(model="other"), "model", "is not served here"),
        ("Abort", pb.AbortRequest(), "request_id", "must not be empty"),
    ],
)
async def test_an_error_names_its_field_for_programs(stub, rpc, request_, field, description):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, rpc)(request_)
    shown_field, shown = violation(caught.value)
    assert shown_field == field
    assert description in shown


async def test_a_stream_ends_with_the_same_details(stub):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ChatStream(pb.ChatRequest()).read()
    assert violation(caught.value)[0] == "messages"


async def test_full_queues_say_when_to_come_again(stub, service, monkeypatch):
    def refuse() -> None:
        raise Overloaded("full", 7)

    monkeypatch.setattr(service, "check_room", refuse)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(prompt())
    retry = error_details_pb2.RetryInfo()
    assert details(caught.value).details[0].Unpack(retry)
    assert retry.retry_delay.seconds == 7


async def test_a_long_error_still_fits_into_the_trailers(stub):
    name = "ü" * 20_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(prompt(model=name))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert len(caught.value.details().encode()) <= MAX_MESSAGE_BYTES + 3


@pytest.mark.parametrize("rpc", ["Chat", "Embed", "Tokenize", "ModelInfo"])
async def test_no_message_may_be_larger_than_a_body_over_http(stub, service, rpc):
    big = "x" * service.max_body_bytes
    request = {
        "Chat": pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=big)]),
        "Embed": pb.EmbedRequest(texts=pb.Texts(texts=[big])),
        "Tokenize": pb.TokenizeRequest(text=big),
        "ModelInfo": pb.ModelInfoRequest(model=big),
    }[rpc]
    with pytest.raises(grpc.aio.AioRpcError, match="more than the limit") as caught:
        await getattr(stub, rpc)(request)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- request ids


async def test_the_clients_id_is_the_answers_id_and_free_to_repeat(stub, lanes):
    answers = await asyncio.gather(*(stub.Generate(prompt(request_id="mine")) for _ in range(2)))
    assert [answer.id for answer in answers] == ["mine", "mine"]
    assert len({request_id for *_, request_id in lanes.calls}) == 2, "lanes tell them apart"
    chunks = [chunk async for chunk in stub.GenerateStream(prompt(request_id="mine"))]
    assert {chunk.id for chunk in chunks} == {"mine"}
    assert (await stub.Generate(prompt())).id not in ("", "mine")


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream", "Chat", "ChatStream"])
async def test_abort_ends_a_call_and_frees_its_lane(stub, lanes, rpc):
    lanes.pause_after = 1
    messages = [pb.ChatMessage(role="user", content="Hi")]
    sampling = pb.Sampling(n=2)
    if rpc.startswith("Chat"):
        request: Any = pb.ChatRequest(messages=messages, request_id="mine", sampling=sampling)
    else:
        request = prompt(request_id="mine", sampling=sampling)
    call = getattr(stub, rpc)(request)
    if rpc.endswith("Stream"):
        await call.read()
    await running(lanes, 2)
    assert (await stub.Abort(pb.AbortRequest(request_id="other"))).aborted == 0
    assert (await stub.Abort(pb.AbortRequest(request_id="mine"))).aborted == 1
    await running(lanes, 0)
    assert len(lanes.aborted) == 2
    with pytest.raises(grpc.aio.AioRpcError, match="aborted by its request_id") as caught:
        while await (call.read() if rpc.endswith("Stream") else call):
            pass
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert (await stub.Abort(pb.AbortRequest(request_id="mine"))).aborted == 0


async def test_a_client_that_cancels_beside_an_abort_still_gets_away(stub, lanes):
    lanes.pause_after = 1
    call = stub.Generate(prompt(request_id="mine"))
    await running(lanes, 1)
    call.cancel()
    await stub.Abort(pb.AbortRequest(request_id="mine"))
    await running(lanes, 0)


async def test_an_abort_between_two_waits_ends_the_next_one():
    calls = Calls()
    with calls.enter("a") as call, calls.enter("a"):
        assert calls.abort("a") == 2
        with pytest.raises(CallAborted):
            await call.wait(lambda: asyncio.sleep(10))
    assert calls.abort("a") == 0


# ---- vectors, tokens, information


async def test_embed_returns_a_vector_per_input(stub, lanes, tokenizer):
    answer = await stub.Embed(pb.EmbedRequest(texts=pb.Texts(texts=["Hello", "world"]), pooling="mean"))
    assert [one.index for one in answer.embeddings] == [0, 1]
    assert [len(one.values) for one in answer.embeddings] == [8, 8]
    assert answer.usage.prompt_tokens == len(tokenizer.encode("Hello")) + len(tokenizer.encode("world"))
    assert lanes.calls[0][1].pooling.pooling == "mean"
    ids = pb.TokenIdLists(lists=[pb.TokenIds(ids=[5, 6]), pb.TokenIds(ids=[7])])
    await stub.Embed(pb.EmbedRequest(token_ids=ids, normalize=False, dimensions=4))
    assert [token_ids for token_ids, *_ in lanes.calls[2:]] == [[5, 6], [7]]
    assert (lanes.calls[2][1].pooling.normalize, lanes.calls[2][1].pooling.dimensions) == (False, 4)


@pytest.mark.parametrize("way", ["cancel", "abort"])
async def test_embeddings_end_with_their_call(stub, lanes, way):
    lanes.pause_after = 0
    call = stub.Embed(pb.EmbedRequest(texts=pb.Texts(texts=["a", "b"]), request_id="mine"))
    await running(lanes, 2)
    if way == "cancel":
        call.cancel()
    else:
        assert (await stub.Abort(pb.AbortRequest(request_id="mine"))).aborted == 1
        assert await call.code() == grpc.StatusCode.CANCELLED
    await running(lanes, 0)


async def test_tokens_are_those_that_the_model_would_see(stub, lanes, tokenizer):
    await stub.Generate(prompt("Hello"))
    answer = await stub.Tokenize(pb.TokenizeRequest(text="Hello"))
    assert (list(answer.token_ids), answer.max_model_len) == (lanes.calls[0][0], 64)
    plain = await stub.Tokenize(pb.TokenizeRequest(text="Hello", add_special_tokens=False))
    assert list(plain.token_ids) == lanes.calls[0][0][1:]
    messages = [pb.ChatMessage(role="user", content="Hello")]
    await stub.Chat(pb.ChatRequest(messages=messages))
    chat = await stub.Tokenize(pb.TokenizeRequest(conversation=pb.Conversation(messages=messages)))
    assert list(chat.token_ids) == lanes.calls[1][0]
    still_open = pb.Conversation(messages=messages, add_generation_prompt=False)
    shorter = await stub.Tokenize(pb.TokenizeRequest(conversation=still_open))
    assert len(shorter.token_ids) == len(chat.token_ids) - 1
    long = await stub.Tokenize(pb.TokenizeRequest(text="x" * 5000))
    assert len(long.token_ids) > 64


async def test_tokens_become_their_text_again(stub, tokenizer):
    token_ids = tokenizer.encode("Hello, wörld")
    answer = await stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))
    assert answer.text == "<|bos|>Hello, wörld"
    answer = await stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=True))
    assert answer.text == "Hello, wörld"


async def test_the_model_and_the_server_describe_themselves(stub, service, lanes):
    model = await stub.ModelInfo(pb.ModelInfoRequest(model="alias"))
    assert model == pb.ModelInfoResponse(
        id="alias",
        max_model_len=64,
        has_chat_template=True,
        system_fingerprint="fp_test",
        max_request_bytes=service.max_body_bytes,
    )
    server = await stub.ServerInfo(pb.ServerInfoRequest())
    assert (server.version, server.ready, list(server.models)) == (stagemesh.__version__, True, ["tiny", "alias"])
    assert server.lanes[0] == pb.Lane(
        id="lane-a", state="serving", num_waiting=2, kv_cache_tokens=1600, free_kv_cache_tokens=1200
    )
    lanes.is_ready = False
    assert not (await stub.ServerInfo(pb.ServerInfoRequest())).ready

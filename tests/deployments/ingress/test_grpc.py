from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stagemesh.deployments.ingress import grpc as grpc_api
from stagemesh.deployments.proto import grpc_predict_v2_pb2, inference_pb2_grpc
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.stages.messages.request import LaneError, TokenDelta

pytestmark = pytest.mark.anyio


@pytest.fixture
def stub(channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def health(channel) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(channel)


def prompt(text: str = "Hi", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.Sampling(**{"max_tokens": 30} | sampling))


def conversation(**sampling: Any) -> pb.ChatRequest:
    messages = [pb.ChatMessage(role="user", content="Hi")]
    return pb.ChatRequest(messages=messages, sampling=pb.Sampling(**sampling))


async def running(lanes: Any, count: int) -> None:
    """Until so many sequences run; fails after a second."""
    async with asyncio.timeout(1):
        while len(lanes.running) != count:
            await asyncio.sleep(0.001)


async def test_generate_returns_the_whole_answer(stub, lanes, tokenizer):
    lanes.num_cached_tokens = 1
    answer = await stub.Generate(prompt(n=2))
    assert [choice.text for choice in answer.choices] == [lanes.answer] * 2
    assert answer.choices[1].finish_reason == "stop"
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(tokenizer.encode("Hi"))
    assert answer.usage.cached_tokens == 1


async def test_generate_stream_returns_pieces_and_then_the_usage(stub, lanes):
    chunks = [chunk async for chunk in stub.GenerateStream(prompt())]
    assert "".join(chunk.text for chunk in chunks) == lanes.answer
    assert len(chunks) > 3
    assert chunks[-2].finish_reason == "stop"
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_chat_goes_through_the_chat_template(stub, lanes, tokenizer):
    request = conversation()
    request.chat_template_kwargs.update({"prefill": "So"})
    answer = await stub.Chat(request)
    assert answer.choices[0].message == pb.ChatMessage(role="assistant", content=lanes.answer)
    assert lanes.calls[0][0] == tokenizer.encode("<|user|>Hi<|end|><|assistant|>So", add_special_tokens=False)


async def test_chat_stream_returns_pieces(stub, lanes):
    chunks = [chunk async for chunk in stub.ChatStream(conversation(n=2))]
    for index in range(2):
        assert "".join(chunk.content for chunk in chunks if chunk.index == index) == lanes.answer


async def test_token_ids_and_all_sampling_fields_reach_the_lane(stub, lanes):
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "stop": ["x"],
        "stop_token_ids": [3],
        "ignore_eos": True,
    }
    tokens = pb.TokenIds(ids=[5, 6])
    await stub.Generate(pb.GenerateRequest(token_ids=tokens, sampling=pb.Sampling(**fields)))
    token_ids, params, _ = lanes.calls[0]
    assert token_ids == [5, 6]
    assert {name: getattr(params, name) for name in fields} == fields | {
        "stop": ("x",),
        "stop_token_ids": (3,),
    }


async def test_every_answer_carries_its_seed_and_the_fingerprint(stub, lanes):
    for call, stream, request in (
        (stub.Generate, stub.GenerateStream, prompt(n=2, seed=2**63 - 1)),
        (stub.Chat, stub.ChatStream, conversation(n=2, seed=2**63 - 1)),
    ):
        answer = await call(request)
        assert [choice.seed for choice in answer.choices] == [2**63 - 1, 0]
        assert answer.system_fingerprint == "fp_test"
        chunks = [chunk async for chunk in stream(request)]
        assert {c.index: c.seed for c in chunks if c.finish_reason} == {0: 2**63 - 1, 1: 0}
        assert [c.system_fingerprint for c in chunks] == [""] * (len(chunks) - 1) + ["fp_test"]
    assert {params.seed for _, params, _ in lanes.calls} == {2**63 - 1, 0}


@pytest.mark.parametrize("rpc", ["Generate", "ChatStream"])
async def test_a_timeout_ends_a_call_and_so_does_its_own_deadline(stub, lanes, rpc):
    lanes.pause_after = 1

    async def run(request: Any, **options: Any) -> None:
        call = getattr(stub, rpc)(request, **options)
        if rpc.endswith("Stream"):
            async for _ in call:
                pass
        await call

    request = conversation() if rpc.startswith("Chat") else prompt()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await run(request, timeout=0.05)
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await running(lanes, 0)
    request.timeout = 0.05
    with pytest.raises(grpc.aio.AioRpcError, match="did not finish within timeout=0.05 s") as ended:
        await run(request)
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await running(lanes, 0)
    request.timeout, request.priority = 10, 101
    with pytest.raises(grpc.aio.AioRpcError, match="priority=101"):
        await run(request)


async def test_models_are_listed(stub):
    answer = await stub.Models(pb.ModelsRequest())
    assert [(model.id, model.max_model_len) for model in answer.models] == [("tiny", 64), ("alias", 64)]


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt=None: is required"),
        (prompt(""), grpc.StatusCode.INVALID_ARGUMENT, "prompt=''"),
        (prompt(max_tokens=-1), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens=-1"),
        (prompt(temperature=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "temperature=nan"),
        (prompt("x" * 5000), grpc.StatusCode.INVALID_ARGUMENT, "maximum context length is 64 tokens"),
        (pb.GenerateRequest(model="gpt-4", text="Hi"), grpc.StatusCode.NOT_FOUND, "model='gpt-4'"),
        (prompt("x" * 3_200_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "more than the limit of 3145728"),
    ],
)
async def test_bad_requests_are_refused_as_over_http(stub, request_, code, details):
    with pytest.raises(grpc.aio.AioRpcError) as whole:
        await stub.Generate(request_)
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        async for _ in stub.GenerateStream(request_):
            pass
    for caught in (whole.value, streamed.value):
        assert caught.code() == code
        assert details in caught.details()


@pytest.mark.parametrize("rpc", ["GenerateStream", "ChatStream"])
async def test_a_stream_has_no_place_for_prompt_logprobs_and_says_so(stub, lanes, rpc):
    request = conversation(prompt_logprobs=1) if rpc == "ChatStream" else prompt(prompt_logprobs=1)
    with pytest.raises(grpc.aio.AioRpcError, match="prompt_logprobs=1: is not allowed with stream=true"):
        async for _ in getattr(stub, rpc)(request):
            pass
    assert not lanes.calls


async def test_an_empty_conversation_is_refused(stub):
    with pytest.raises(grpc.aio.AioRpcError, match="messages"):
        await stub.Chat(pb.ChatRequest())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LaneError("unavailable", "why"), grpc.StatusCode.UNAVAILABLE),
        (LaneError("overloaded", "why"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (LaneError("timeout", "why"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_lane_errors_and_bugs_have_their_code(stub, lanes, error, code):
    lanes.error = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Chat(conversation())
    assert caught.value.code() == code
    assert "secret" not in caught.value.details()


async def test_a_failure_in_mid_stream_ends_the_stream_with_its_code(stub, lanes):
    lanes.deltas, lanes.error = [TokenDelta("", 0, [70])], LaneError("lost", "the lane died")
    chunks = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for chunk in stub.GenerateStream(prompt()):
            chunks.append(chunk)
    assert len(chunks) == 1
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the lane died")


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream", "Chat", "ChatStream"])
@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_a_call_releases_its_lane(stub, lanes, rpc, n):
    lanes.pause_after = 1
    call = getattr(stub, rpc)(conversation(n=n) if rpc.startswith("Chat") else prompt(n=n))
    if rpc.endswith("Stream"):
        await call.read()
    await running(lanes, n)
    call.cancel()
    await running(lanes, 0)
    assert len(lanes.aborted) == n


async def test_health_follows_the_lanes(health, lanes):
    services = {"", "stagemesh.v1.Inference", "inference.GRPCInferenceService"}
    for service in services:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert set((await health.List(health_pb2.HealthListRequest())).statuses) == services
    lanes.is_ready = False
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def test_watch_tells_every_change(health, lanes, monkeypatch):
    monkeypatch.setattr(grpc_api, "HEALTH_POLL_S", 0.01)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    lanes.is_ready = False
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    lanes.is_ready = True
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_watch_of_an_unknown_service_says_so(health):
    watch = health.Watch(health_pb2.HealthCheckRequest(service="other"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("generated", [pb, grpc_predict_v2_pb2])
def test_the_generated_code_is_that_of_the_proto_file(tmp_path, generated):
    protoc = pytest.importorskip("grpc_tools.protoc")
    path = Path(generated.__file__).parent
    package = "stagemesh/deployments/proto"
    includes = [f"-I{package}={path}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    arguments = ["protoc", *includes, f"--descriptor_set_out={tmp_path / 'out'}", generated.DESCRIPTOR.name]
    assert protoc.main(arguments) == 0
    [current] = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "out").read_bytes()).file
    written = descriptor_pb2.FileDescriptorProto.FromString(generated.DESCRIPTOR.serialized_pb)
    for file in (current, written):
        forget_json_names(file.message_type)  # only one of the two outputs writes them
    assert written == current, "run `make proto`"


def forget_json_names(messages: Any) -> None:
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        forget_json_names(message.nested_type)

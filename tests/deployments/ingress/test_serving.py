"""The served demo model, through its doors: real clients, real answers, bad input, clients that leave."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import openai
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.harness import Cluster, chat, eventually, num_right

from stagemesh.deployments.proto import (
    grpc_predict_v2_pb2,
    grpc_predict_v2_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Cluster:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2)
    return cluster


@pytest.mark.parametrize("skill", ["add", "lookup"])
def test_the_demo_model_answers_held_out_questions(served: Cluster, skill: str) -> None:
    assert num_right(served, skill, 200) >= 0.95 * 200


def test_the_first_question_of_the_readme(served: Cluster) -> None:
    with served.client() as client:
        assert chat(client, "What is 17+25?") == "42"


def test_the_openai_client_gets_the_same_answer_streaming_and_not(served: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    assert [model.id for model in client.models.list().data] == ["demo"]
    ask: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is 31+46?"}],
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == "77"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "77"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    text = client.completions.create(model="demo", prompt="The king", max_tokens=12, temperature=0, n=2)
    assert text.choices[0].text == text.choices[1].text
    assert text.usage is not None and text.usage.completion_tokens == 24


def test_a_seeded_answer_is_the_same_alone_and_in_company(served: Cluster) -> None:
    def sample(client: httpx.Client, seed: int) -> str:
        body = {
            "model": "demo",
            "prompt": "First Citizen:",
            "max_tokens": 24,
            "temperature": 1.0,
            "seed": seed,
        }
        text: str = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    with served.client() as client, ThreadPoolExecutor(16) as pool:
        alone = sample(client, 7)
        company = list(pool.map(lambda seed: sample(client, seed), [7, *range(100, 115)]))
    assert company[0] == alone
    assert len(set(company)) > 8, "different seeds should differ"


def test_a_grpc_client_gets_what_http_gives(served: Cluster) -> None:
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        message = inference_pb2.ChatMessage(role="user", content="What is 17+25?")
        request = inference_pb2.ChatRequest(
            model="demo", messages=[message], sampling=inference_pb2.Sampling(temperature=0.0)
        )
        assert stub.Chat(request, timeout=30).choices[0].message.content == "42"
        streamed = list(stub.ChatStream(request, timeout=30))
        assert "".join(chunk.content for chunk in streamed) == "42"
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            stub.Chat(inference_pb2.ChatRequest(model="other", messages=[message]), timeout=30)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_client_that_leaves_frees_its_blocks_within_a_second(served: Cluster) -> None:
    eventually(lambda: served.metrics()["vllm:num_requests_running"] == 0, 10, "the lane is idle")
    free = served.metrics()["stagemesh:kv_blocks_free"]
    body = {"model": "demo", "prompt": "The king", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with served.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
        eventually(lambda: served.metrics()["stagemesh:kv_blocks_free"] < free, 5, "blocks are in use")
    eventually(lambda: served.metrics()["stagemesh:kv_blocks_free"] == free, 1, "blocks are free again")


@pytest.mark.parametrize("way", ["cancel", "deadline", "abort"])
@pytest.mark.parametrize("rpc", ["GenerateStream", "ModelStreamInfer"])
def test_a_grpc_call_that_ends_early_frees_its_blocks(served: Cluster, rpc: str, way: str) -> None:
    eventually(lambda: served.metrics()["vllm:num_requests_running"] == 0, 10, "the lane is idle")
    free = served.metrics()["stagemesh:kv_blocks_free"]
    timeout = 2 if way == "deadline" else 60
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        if rpc == "GenerateStream":
            sampling = inference_pb2.Sampling(max_tokens=1500, ignore_eos=True)
            request = inference_pb2.GenerateRequest(model="demo", text="The king", sampling=sampling, request_id="long")
            call = stub.GenerateStream(request, timeout=timeout)
        else:
            parameters = {"max_tokens": 1500, "ignore_eos": True}
            request = infer_request("The king", id="long", stream=True, sampling_parameters=parameters)
            streams = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = streams.ModelStreamInfer(iter([request]), timeout=timeout)
        next(call)
        eventually(lambda: served.metrics()["stagemesh:kv_blocks_free"] < free, 5, "blocks are in use")
        if way == "cancel":
            call.cancel()
        elif way == "abort":
            assert stub.Abort(inference_pb2.AbortRequest(request_id="long"), timeout=30).aborted == 1
        else:
            assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: served.metrics()["stagemesh:kv_blocks_free"] == free, 1, "blocks are free again")


def infer_request(text: str, *, id: str = "", **tensors: Any) -> grpc_predict_v2_pb2.ModelInferRequest:
    """With raw contents, as Triton's client sends them."""
    request = grpc_predict_v2_pb2.ModelInferRequest(model_name="demo", id=id)
    for name, value in {"text_input": text, **tensors}.items():
        is_flag = isinstance(value, bool)
        request.inputs.add(name=name, shape=[1], datatype="BOOL" if is_flag else "BYTES")
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        request.raw_input_contents.append(bytes([value]) if is_flag else len(data).to_bytes(4, "little") + data)
    return request


def test_kserves_protocol_works_through_serve(served: Cluster) -> None:
    with served.client() as client:
        body = {"model": "demo", "prompt": "The king", "max_tokens": 12, "temperature": 0}
        text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    parameters = {"max_tokens": 12, "temperature": 0}
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(grpc_predict_v2_pb2.ServerReadyRequest(), timeout=30).ready
        whole = stub.ModelInfer(infer_request("The king", sampling_parameters=parameters), timeout=30)
        assert whole.raw_output_contents[0][4:].decode() == "The king" + text
        requests = [infer_request("The king", id=id, stream=True, sampling_parameters=parameters) for id in "abc"]
        texts = dict.fromkeys("abc", "")
        for response in stub.ModelStreamInfer(iter(requests), timeout=30):
            assert not response.error_message
            texts[response.infer_response.id] += response.infer_response.raw_output_contents[0][4:].decode()
        assert texts == dict.fromkeys("abc", text)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(infer_request("", sampling_parameters=parameters), timeout=30)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "grpc-status-details-bin" in dict(refused.value.trailing_metadata())


def test_a_client_finds_everything_by_reflection(served: Cluster) -> None:
    reflection = pytest.importorskip("grpc_reflection.v1alpha.proto_reflection_descriptor_database")
    with grpc.insecure_channel(served.grpc_address) as channel:
        database = reflection.ProtoReflectionDescriptorDatabase(channel)
        services = {"stagemesh.v1.Inference", "inference.GRPCInferenceService", "grpc.health.v1.Health"}
        assert set(database.get_services()) >= services
        method = (
            descriptor_pool.DescriptorPool(database)
            .FindServiceByName("stagemesh.v1.Inference")
            .methods_by_name["Tokenize"]
        )
        ask, answer = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        tokenize = channel.unary_unary(
            "/stagemesh.v1.Inference/Tokenize",
            request_serializer=ask.SerializeToString,
            response_deserializer=answer.FromString,
        )
        response: Any = tokenize(ask(text="The king"), timeout=30)
        assert len(response.token_ids) > 1


def test_a_repeated_prompt_comes_from_the_prefix_cache(served: Cluster) -> None:
    prompt = "the crown and the throne of " * 12
    body = {"model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    with served.client() as client:
        first = client.post("/v1/completions", json=body).json()
        again = client.post("/v1/completions", json=body).json()
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (again["usage"]["prompt_tokens"] - 1) // 16 * 16


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{not json", 400, "JSON"),
        (b'{"model": "demo", "messages": "hello"}', 400, "messages"),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404, "other"),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
            400,
            "max_tokens",
        ),
        (b'{"model": "demo", "messages": []}', 400, "messages"),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "top_p": 7}', 400, "top_p"),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "' + b"go " * 700_000 + b'"}]}',
            400,
            "2048",
        ),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "' + b"go " * 20_000 + b'"}]}',
            400,
            "2048",
        ),
    ],
    ids=["no-json", "type", "model", "max_tokens", "empty", "top_p", "2MB", "too-long"],
)
def test_bad_input_gets_a_clear_error_object(served: Cluster, body: bytes, status: int, said: str) -> None:
    with served.client() as client:
        response = client.post("/v1/chat/completions", content=body)
        assert response.status_code == status, response.text[:500]
        assert said in response.json()["error"]["message"]
        assert chat(client, "What is 17+25?") == "42"


def test_fifty_requests_at_once_all_end(served: Cluster) -> None:
    barrier = threading.Barrier(25)

    def ask(i: int) -> str:
        with served.client() as client:
            barrier.wait(timeout=30)
            return chat(client, f"What is {10 + i}+{20 + i}?")

    with ThreadPoolExecutor(25) as pool:
        texts = list(pool.map(ask, range(25)))
    assert all(text.isdigit() for text in texts)

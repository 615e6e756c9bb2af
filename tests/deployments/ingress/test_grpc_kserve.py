"""The Open Inference Protocol, as KServe's and Triton's clients speak it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import stagemesh
from stagemesh.deployments.ingress import grpc_kserve
from stagemesh.deployments.proto import grpc_predict_v2_pb2 as pb
from stagemesh.deployments.proto import grpc_predict_v2_pb2_grpc, inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.anyio


@pytest.fixture
def stub(channel) -> grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub:
    return grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(
    text: str = "Hi", *, id: str = "", raw: bool = False, outputs: tuple[str, ...] = (), **tensors: Any
) -> pb.ModelInferRequest:
    """Booleans, texts, and what becomes JSON. raw: as Triton's client writes it."""
    message = pb.ModelInferRequest(model_name="tiny", id=id)
    for name, value in {"text_input": text, **tensors}.items():
        tensor = message.inputs.add(name=name, shape=[1], datatype="BOOL" if isinstance(value, bool) else "BYTES")
        data = value if isinstance(value, bool) else (value if isinstance(value, str) else json.dumps(value)).encode()
        if raw:
            is_flag = isinstance(data, bool)
            message.raw_input_contents.append(bytes([data]) if is_flag else len(data).to_bytes(4, "little") + data)
        elif isinstance(data, bool):
            tensor.contents.bool_contents.append(data)
        else:
            tensor.contents.bytes_contents.append(data)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def texts(response: pb.ModelInferResponse, name: str = "text_output") -> list[str]:
    [tensor] = [output for output in response.outputs if output.name == name]
    assert (tensor.datatype, tensor.shape) == ("BYTES", [len(tensor.contents.bytes_contents)])
    return [text.decode() for text in tensor.contents.bytes_contents]


async def running(lanes: Any, count: int) -> None:
    """Until so many sequences run; fails after a second."""
    async with asyncio.timeout(1):
        while len(lanes.running) != count:
            await asyncio.sleep(0.001)


async def test_the_server_and_its_model_describe_themselves(stub, lanes):
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="tiny", version="1"))).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
    metadata = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("stagemesh", stagemesh.__version__)
    model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="alias"))
    assert (model.name, list(model.versions)) == ("alias", ["1"])
    assert {(one.name, one.datatype, *one.shape) for one in model.inputs} >= {
        ("text_input", "BYTES", 1),
        ("stream", "BOOL", 1),
        ("sampling_parameters", "BYTES", 1),
        ("exclude_input_in_output", "BOOL", 1),
    }
    assert ("text_output", "BYTES", -1) in {(one.name, one.datatype, *one.shape) for one in model.outputs}
    lanes.is_ready = False
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny", version="2"))
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def test_infer_answers_with_the_prompt_in_front_unless_told_otherwise(stub, lanes):
    response = await stub.ModelInfer(request(id="7"))
    assert texts(response) == ["Hi" + lanes.answer]
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "7")
    response = await stub.ModelInfer(request(exclude_input_in_output=True))
    assert texts(response) == [lanes.answer]


async def test_raw_contents_are_answered_raw(stub, lanes):
    asked = request("Hü", raw=True, exclude_input_in_output=True, return_num_output_tokens=True)
    response = await stub.ModelInfer(asked)
    text, count = response.raw_output_contents
    assert text == len(lanes.answer).to_bytes(4, "little") + lanes.answer.encode()
    assert int.from_bytes(count, "little") > 3
    assert [output.HasField("contents") for output in response.outputs] == [False, False]
    assert lanes.calls[0][0] == lanes.tokenizer.encode("Hü")


@pytest.mark.parametrize("as_tensor", [True, False])
async def test_sampling_parameters_come_as_a_tensor_or_one_by_one(stub, lanes, as_tensor):
    fields = {"max_tokens": "9", "temperature": "0.5", "top_k": 7, "n": 2, "ignore_eos": True}
    if as_tensor:
        asked = request(sampling_parameters=fields | {"stop": ["5"], "logit_bias": {"3": -1.5}})
    else:
        asked = request()
        for name, value in fields.items():
            kind = {str: "string_param", int: "int64_param", bool: "bool_param"}[type(value)]
            setattr(asked.parameters[name], kind, value)
        asked.parameters["triton_enable_empty_final_response"].bool_param = True
        asked.parameters["timeout"].int64_param = 1
    assert len(texts(await stub.ModelInfer(asked))) == 2
    params = lanes.calls[0][1]
    assert (params.max_tokens, params.temperature, params.top_k, params.ignore_eos) == (9, 0.5, 7, True)
    assert (params.stop, params.logit_bias) == ((("5",), {3: -1.5}) if as_tensor else ((), {}))


async def test_more_outputs_come_where_they_are_asked_for(stub, lanes, tokenizer):
    names = ("finish_reason", "num_input_tokens")
    for asked in (
        request(outputs=("text_output", *names)),
        request(return_finish_reason=True, return_num_input_tokens=True),
    ):
        response = await stub.ModelInfer(asked)
        assert [output.name for output in response.outputs] == ["text_output", *names]
        assert texts(response, "finish_reason") == ["stop"]
        assert response.outputs[2].contents.uint_contents == [len(tokenizer.encode("Hi"))]


def changed(message: pb.ModelInferRequest, **fields: Any) -> pb.ModelInferRequest:
    """With other fields of its first tensor."""
    for name, value in fields.items():
        if name == "shape":
            message.inputs[0].shape[:] = value
        elif name == "contents":
            message.inputs[0].contents.bytes_contents[:] = value
        else:
            setattr(message.inputs[0], name, value)
    return message


RAW = request(raw=True)
del RAW.raw_input_contents[:]
RAW.raw_input_contents.append(b"\x09\0\0\0Hi")


@pytest.mark.parametrize(
    ("message", "details"),
    [
        (pb.ModelInferRequest(model_name="tiny"), "text_input=None: is required"),
        (request(stream=True), "needs ModelStreamInfer"),
        (request(images="x"), "inputs='images': is not an input; inputs: text_input"),
        (request(outputs=("logits",)), "outputs='logits': is not an output"),
        (request(sampling_parameters="[1]"), "must be a JSON object"),
        (request(sampling_parameters="{"), "is not valid JSON"),
        (request(sampling_parameters='{"stop": "\\ud800"}'), "is not valid JSON"),
        (request(sampling_parameters="[" * 100_000), "sampling_parameters"),
        (request(sampling_parameters={"prompt": "x"}), "prompt='x': is no sampling parameter"),
        (request(sampling_parameters={"temperature": -1}), "temperature=-1"),
        (request(sampling_parameters={"temperature": "warm"}), "temperature="),
        (request(sampling_parameters={"temperature": "[" * 10_000}), "temperature="),
        (changed(request(), datatype="INT32"), "text_input.datatype='INT32': must be BYTES"),
        (changed(request(), shape=[2]), "text_input.shape=[2]: must be [1]"),
        (changed(request(), contents=[]), "text_input=[]: must hold one element"),
        (changed(request(), contents=[b"\xff"]), "must be UTF-8"),
        (RAW, "must hold one element"),
    ],
)
async def test_bad_requests_are_refused_with_what_would_do(stub, lanes, message, details):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(message)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details in caught.value.details()
    assert not lanes.calls


async def test_a_stream_brings_new_text_and_says_which_is_last(stub, lanes):
    call = stub.ModelStreamInfer(iter([request(id="a", stream=True, return_finish_reason=True)]))
    responses = [one.infer_response async for one in call]
    assert "".join(texts(one)[0] for one in responses) == lanes.answer
    assert len(responses) > 3
    finals = [one.parameters["triton_final_response"].bool_param for one in responses]
    assert finals == [False] * (len(responses) - 1) + [True]
    assert [texts(one, "finish_reason") for one in responses] == [["None"]] * (len(responses) - 1) + [["stop"]]
    assert {one.id for one in responses} == {"a"}


async def test_requests_of_a_stream_run_side_by_side_and_fail_alone(stub, service, lanes):
    lanes.pause_after = 1

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        yield request(id="slow", stream=True)
        yield request(id="bad", stream=True, exclude_input_in_output=False)
        yield request(id="big", text="x" * service.max_body_bytes)
        yield request(id="whole", sampling_parameters={"n": 2})

    call = stub.ModelStreamInfer(requests())
    seen: dict[str, list[Any]] = {}
    async for one in call:
        seen.setdefault(one.infer_response.id, []).append(one)
        if len(seen) == 3:
            lanes.resume.set()
    assert "is not allowed with stream=true" in seen["bad"][0].error_message
    assert "more than the limit" in seen["big"][0].error_message
    assert "".join(texts(one.infer_response)[0] for one in seen["slow"]) == lanes.answer
    [whole] = seen["whole"]
    assert texts(whole.infer_response) == ["Hi" + lanes.answer] * 2
    assert await call.code() == grpc.StatusCode.OK


@pytest.mark.parametrize("rpc", ["ModelInfer", "ModelStreamInfer"])
@pytest.mark.parametrize("way", ["cancel", "deadline", "abort"])
async def test_a_call_that_ends_early_releases_its_lane(stub, channel, lanes, rpc, way):
    lanes.pause_after = 1
    asked = request(id="mine", sampling_parameters={"n": 2}, stream=rpc == "ModelStreamInfer")
    timeout = 0.2 if way == "deadline" else 10
    call = (
        stub.ModelInfer(asked, timeout=timeout)
        if rpc == "ModelInfer"
        else stub.ModelStreamInfer(iter([asked]), timeout=timeout)
    )
    if rpc == "ModelStreamInfer":
        await call.read()
    await running(lanes, 2)
    if way == "cancel":
        call.cancel()
    elif way == "abort":
        other = inference_pb2_grpc.InferenceStub(channel)
        assert (await other.Abort(inference_pb2.AbortRequest(request_id="mine"))).aborted == 1
        if rpc == "ModelStreamInfer":
            while not (response := await call.read()).error_message:
                pass
            assert response.infer_response.id == "mine"
    elif way == "deadline":
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await running(lanes, 0)
    assert len(lanes.aborted) == 2


async def test_a_stream_takes_only_so_many_requests_at_a_time(stub, lanes, monkeypatch):
    monkeypatch.setattr(grpc_kserve, "MAX_STREAM_REQUESTS", 3)
    lanes.pause_after = 0
    call = stub.ModelStreamInfer(iter([request(id=str(i)) for i in range(4)]))
    with pytest.raises(grpc.aio.AioRpcError, match="3 requests of this stream") as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await running(lanes, 0)


def test_every_field_has_the_number_of_the_public_protos():
    numbers = {
        message.full_name.removeprefix("inference."): {field.name: field.number for field in message.fields}
        for top in pb.DESCRIPTOR.message_types_by_name.values()
        for message in (top, *top.nested_types)
        if not message.GetOptions().map_entry
    }
    tensor = {"name": 1, "datatype": 2, "shape": 3}
    full = tensor | {"parameters": 4, "contents": 5}
    named = {"model_name": 1, "model_version": 2, "id": 3, "parameters": 4}
    ask = {"name": 1, "version": 2}
    parameters = ("bool", "int64", "string", "double", "uint64")
    contents = ("bool", "int", "int64", "uint", "uint64", "fp32", "fp64", "bytes")
    assert numbers == {
        "ServerLiveRequest": {},
        "ServerLiveResponse": {"live": 1},
        "ServerReadyRequest": {},
        "ServerReadyResponse": {"ready": 1},
        "ModelReadyRequest": ask,
        "ModelReadyResponse": {"ready": 1},
        "ServerMetadataRequest": {},
        "ServerMetadataResponse": ask | {"extensions": 3},
        "ModelMetadataRequest": ask,
        "ModelMetadataResponse": {"name": 1, "versions": 2, "platform": 3, "inputs": 4, "outputs": 5},
        "ModelMetadataResponse.TensorMetadata": tensor,
        "ModelInferRequest": named | {"inputs": 5, "outputs": 6, "raw_input_contents": 7},
        "ModelInferRequest.InferInputTensor": full,
        "ModelInferRequest.InferRequestedOutputTensor": {"name": 1, "parameters": 2},
        "ModelInferResponse": named | {"outputs": 5, "raw_output_contents": 6},
        "ModelInferResponse.InferOutputTensor": full,
        "ModelStreamInferResponse": {"error_message": 1, "infer_response": 2},
        "InferParameter": {f"{kind}_param": i + 1 for i, kind in enumerate(parameters)},
        "InferTensorContents": {f"{kind}_contents": i + 1 for i, kind in enumerate(contents)},
    }

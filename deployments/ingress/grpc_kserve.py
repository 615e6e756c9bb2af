"""`inference.GRPCInferenceService`: the Open Inference Protocol, with the tensors of Triton's vLLM backend.

Sampling parameters are the fields of /v1/completions, as JSON in the tensor `sampling_parameters` or one by one among
the request's parameters. As there, numbers may be strings. The prompt stands in front of the answer unless
`exclude_input_in_output` is true or the answer is streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, get_args

import msgspec

import stagemesh
from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.errors import UnknownModel
from stagemesh.deployments.ingress.grpc_rpc import GrpcContext, Rpcs, error_message, streamed, unary
from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.requests import CompletionRequest
from stagemesh.deployments.openai.responses import ModelCard
from stagemesh.deployments.proto import grpc_predict_v2_pb2 as pb
from stagemesh.stages.messages.request import LaneError

VERSION = "1"
"""Of every model."""
INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
"""One element each; all but the first may be left out."""
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""One element per choice, of num_input_tokens one for all."""
MAX_STREAM_REQUESTS = 256
"""Of one ModelStreamInfer at a time. Serve itself would keep any number of unread ones."""
MAX_UNREAD_RESPONSES = 64
"""Of one ModelStreamInfer; behind them its requests wait for the client."""

# Of Triton's client and server, not for the model. `timeout` is in microseconds there, and for its own queue.
_FOREIGN = ("sequence_id", "sequence_start", "sequence_end", "binary_data_output", "timeout", "priority")
_NUMBERS = {
    name
    for name, field in CompletionRequest.model_fields.items()
    if NoneType in get_args(field.annotation) and {*get_args(field.annotation)} <= {int, float, bool, NoneType}
}


@dataclass(frozen=True)
class Inference:
    """A ModelInferRequest, read."""

    request: pb.ModelInferRequest
    text: str
    stream: bool
    prompt_in_output: bool
    fields: dict[str, Any]
    """Of a CompletionRequest, beside those that are tensors."""
    outputs: Sequence[str]

    @classmethod
    def read(cls, request: pb.ModelInferRequest) -> Inference:
        """Raises ConfigError."""
        if len({tensor.name for tensor in request.inputs}) < len(request.inputs):
            raise ConfigError("inputs", [tensor.name for tensor in request.inputs], "must not hold a tensor twice")
        if request.raw_input_contents and len(request.raw_input_contents) != len(request.inputs):
            count = len(request.raw_input_contents)
            raise ConfigError("raw_input_contents", count, f"must be as many as inputs, {len(request.inputs)}")
        raws = request.raw_input_contents or [None] * len(request.inputs)
        values = {tensor.name: _element(tensor, raw) for tensor, raw in zip(request.inputs, raws, strict=True)}
        if "text_input" not in values:
            raise ConfigError("text_input", None, "is required")
        stream = values.get("stream", False)
        without_prompt = values.get("exclude_input_in_output", stream)
        if stream and not without_prompt:
            raise ConfigError("exclude_input_in_output", False, "is not allowed with stream=true")
        outputs = [output.name for output in request.outputs]
        for name in outputs:
            if name not in OUTPUTS:
                raise ConfigError("outputs", name, f"is not an output; outputs: {', '.join(OUTPUTS)}")
        flagged = [name for name in OUTPUTS if name == "text_output" or values.get(f"return_{name}")]
        fields = _sampling_fields(values.get("sampling_parameters"), request.parameters)
        return cls(request, values["text_input"], stream, not without_prompt, fields, outputs or flagged)

    def completion(self) -> CompletionRequest:
        """Raises ConfigError."""
        fields = {**self.fields, "model": self.request.model_name, "prompt": self.text, "stream": self.stream}
        if self.request.id:
            fields["request_id"] = self.request.id
        return CompletionRequest.parse(fields)

    def response(self, stream: GenerationStream, texts: Sequence[str], counts: Sequence[int]) -> pb.ModelInferResponse:
        """texts, counts of tokens: what is new of each choice."""
        values: dict[str, Sequence[Any]] = {
            "text_output": [text.encode() for text in texts],
            "finish_reason": [str(choice.finish_reason).encode() for choice in stream.choices],
            "num_input_tokens": [stream.usage.prompt_tokens],
            "num_output_tokens": counts,
        }
        response = _named(self.request)
        response.model_version = VERSION
        for name in self.outputs:
            output = response.outputs.add(name=name, datatype=OUTPUTS[name], shape=[len(values[name])])
            if self.request.raw_input_contents:  # the client knows that form
                response.raw_output_contents.append(_raw(OUTPUTS[name], values[name]))
            elif OUTPUTS[name] == "BYTES":
                output.contents.bytes_contents.extend(values[name])
            else:
                output.contents.uint_contents.extend(values[name])
        return response


class KServeRpcs(Rpcs):
    @unary(pb.ServerLiveResponse)
    async def ServerLive(self, request: pb.ServerLiveRequest, grpc_context: GrpcContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    @unary(pb.ServerReadyResponse)
    async def ServerReady(self, request: pb.ServerReadyRequest, grpc_context: GrpcContext) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.inference_service.ready())

    @unary(pb.ModelReadyResponse)
    async def ModelReady(self, request: pb.ModelReadyRequest, grpc_context: GrpcContext) -> pb.ModelReadyResponse:
        try:
            self._served(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self.inference_service.ready())

    @unary(pb.ServerMetadataResponse)
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, grpc_context: GrpcContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="stagemesh", version=stagemesh.__version__)

    @unary(pb.ModelMetadataResponse)
    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, grpc_context: GrpcContext
    ) -> pb.ModelMetadataResponse:
        model = self._served(request.name, request.version)
        metadata = pb.ModelMetadataResponse(name=model.id, versions=[VERSION], platform="stagemesh")
        for name, datatype in INPUTS.items():
            metadata.inputs.add(name=name, datatype=datatype, shape=[1])
        for name, datatype in OUTPUTS.items():
            metadata.outputs.add(name=name, datatype=datatype, shape=[1 if name == "num_input_tokens" else -1])
        return metadata

    @unary(pb.ModelInferResponse)
    async def ModelInfer(self, request: pb.ModelInferRequest, grpc_context: GrpcContext) -> pb.ModelInferResponse:
        inference = Inference.read(request)
        if inference.stream:
            raise ConfigError("stream", True, "needs ModelStreamInfer")
        async with aclosing(self._infer(inference)) as responses:
            return await anext(responses)

    @streamed
    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """What one request raises is its own response; the others go on."""
        queue: asyncio.Queue[pb.ModelStreamInferResponse | Exception | None] = asyncio.Queue(MAX_UNREAD_RESPONSES)
        reader = asyncio.create_task(self._answer_all(requests, queue))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _answer_all(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        queue: asyncio.Queue[pb.ModelStreamInferResponse | Exception | None],
    ) -> None:
        """Responses into `queue`, then None, or the exception that ends the call. Cancelling this ends all requests."""

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                self.check_size(request)
                async with aclosing(self._infer(Inference.read(request))) as responses:
                    async for response in responses:
                        await queue.put(pb.ModelStreamInferResponse(infer_response=response))
            except Exception as error:
                response = _named(request)
                await queue.put(
                    pb.ModelStreamInferResponse(error_message=error_message(error), infer_response=response)
                )

        tasks: set[asyncio.Task[None]] = set()
        try:
            # Read without waiting, else they would pile up at Serve, which knows no limit.
            async for request in requests:
                if len(tasks) >= MAX_STREAM_REQUESTS:
                    reason = f"{MAX_STREAM_REQUESTS} requests of this stream have no complete answer yet"
                    raise LaneError("overloaded", reason)
                task = asyncio.create_task(answer(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _infer(self, inference: Inference) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """One response, or one per step. Raises what a CompletionRequest does."""
        request = inference.request
        self._served(request.model_name, request.model_version)
        with self.calls.enter(request.id) as call:
            self.inference_service.check_room()
            stream = await call.wait(partial(self.inference_service.complete, inference.completion()))
            choices = stream.choices
            if not inference.stream:
                texts = await call.wait(stream.collect)
                prompt = inference.text if inference.prompt_in_output else ""
                response = inference.response(
                    stream, [prompt + text for text in texts], [len(choice.token_ids) for choice in choices]
                )
                response.parameters["triton_final_response"].bool_param = True
                yield response
                return
            async with aclosing(stream.deltas()) as deltas:
                while (delta := await call.wait(partial(anext, deltas, None))) is not None:
                    texts, counts = [""] * len(choices), [0] * len(choices)
                    texts[delta.index], counts[delta.index] = delta.text, len(delta.token_ids)
                    response = inference.response(stream, texts, counts)
                    is_last = all(choice.finish_reason is not None for choice in choices)
                    response.parameters["triton_final_response"].bool_param = is_last
                    yield response

    def _served(self, name: str, version: str) -> ModelCard:
        """Raises UnknownModel."""
        if version not in ("", VERSION):
            raise UnknownModel("version", version, f"is not served here; served: {VERSION}")
        return self.inference_service.model(name)


def _named(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    return pb.ModelInferResponse(model_name=request.model_name, id=request.id)


def _element(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Any:
    """The one element, a text or a boolean. Raises ConfigError."""
    if tensor.name not in INPUTS:
        raise ConfigError("inputs", tensor.name, f"is not an input; inputs: {', '.join(INPUTS)}")
    if tensor.datatype != INPUTS[tensor.name]:
        raise ConfigError(f"{tensor.name}.datatype", tensor.datatype, f"must be {INPUTS[tensor.name]}")
    if any(size != 1 for size in tensor.shape):
        raise ConfigError(f"{tensor.name}.shape", list(tensor.shape), "must be [1]")
    if tensor.datatype == "BOOL":
        flags = list(tensor.contents.bool_contents) if raw is None else [byte != 0 for byte in raw]
        if len(flags) != 1:
            raise ConfigError(tensor.name, flags, "must hold one element")
        return flags[0]
    texts = list(tensor.contents.bytes_contents) if raw is None else [raw[4:]]
    if len(texts) != 1 or (raw is not None and int.from_bytes(raw[:4], "little") != len(raw) - 4):
        raise ConfigError(tensor.name, raw or texts, "must hold one element")
    try:
        return texts[0].decode()
    except UnicodeDecodeError as error:
        raise ConfigError(tensor.name, texts[0], f"must be UTF-8: {error.reason}") from None


def _sampling_fields(text: str | None, parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Numbers that came as strings are numbers. Raises ConfigError."""
    fields: Any
    if text is None:
        values = (
            (name, getattr(value, value.WhichOneof("parameter_choice") or "")) for name, value in parameters.items()
        )
        fields = {name: v for name, v in values if name not in _FOREIGN and not name.startswith("triton_")}
    else:
        try:
            fields = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ConfigError("sampling_parameters", text, f"is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError("sampling_parameters", text, "must be a JSON object")
    for name in ("model", "prompt", "stream", "request_id"):
        if name in fields:
            raise ConfigError(name, fields[name], "is no sampling parameter")
    return {name: _number(value) if name in _NUMBERS else value for name, value in fields.items()}


def _number(value: Any) -> Any:
    """`value`, read as JSON if it is a string. What is wrong with it the schema says."""
    try:
        return msgspec.json.decode(value) if isinstance(value, str) else value
    except (msgspec.DecodeError, RecursionError):
        return value


def _raw(datatype: str, values: Iterable[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(len(value).to_bytes(4, "little") + value for value in values)
    return b"".join(value.to_bytes(4, "little") for value in values)

"""The gRPC frontend: `stagemesh.v1.Inference` and `grpc.health.v1.Health` around an InferenceService.

Serve calls the method named like the rpc, with the context as `grpc_context`. Errors are set on the context, because
Serve would log an exception with its traceback for every mistyped request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf import json_format
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.auth import ApiKeys, guarded
from stagemesh.deployments.ingress.errors import BodyTooLarge, report_error
from stagemesh.deployments.ingress.service import GenerationStream, InferenceService
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.stages.text.output import DecodedLogprob, OutputProcessor, TextDelta

HEALTH_POLL_S = 0.5

ResponseT = TypeVar("ResponseT", pb.GenerateResponse, pb.ChatResponse)
ChunkT = TypeVar("ChunkT", pb.GenerateChunk, pb.ChatChunk)

_SERVICES = ("", pb.DESCRIPTOR.services_by_name["Inference"].full_name)


class GrpcContext(Protocol):
    """What RayServegRPCContext and grpc.aio.ServicerContext share."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


@guarded
class GrpcApi:
    """A mixin for the ingress deployment, which sets `inference_service` and `api_keys`.

    Every rpc of a subclass asks for a key, unless it is one of health's.
    """

    inference_service: InferenceService
    api_keys = ApiKeys()

    def __init_subclass__(cls) -> None:
        guarded(cls)

    async def Generate(self, request: pb.GenerateRequest, grpc_context: GrpcContext) -> pb.GenerateResponse:
        accepting = self._accept_generate(request, stream=False)
        return await _whole(accepting, pb.GenerateResponse, pb.GenerateChoice, _text, grpc_context)

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        accepting = self._accept_generate(request, stream=True)
        async with aclosing(_chunks(accepting, pb.GenerateChunk, _text, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Chat(self, request: pb.ChatRequest, grpc_context: GrpcContext) -> pb.ChatResponse:
        accepting = self._accept_chat(request, stream=False)
        return await _whole(accepting, pb.ChatResponse, pb.ChatChoice, _message_of_choice, grpc_context)

    async def ChatStream(
        self, request: pb.ChatRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.ChatChunk, None]:
        accepting = self._accept_chat(request, stream=True)
        async with aclosing(_chunks(accepting, pb.ChatChunk, _message_of_delta, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Models(self, request: pb.ModelsRequest, grpc_context: GrpcContext) -> pb.ModelsResponse:
        cards = self.inference_service.models()
        return pb.ModelsResponse(models=[pb.Model(id=card.id, max_model_len=card.max_model_len) for card in cards])

    async def Check(self, request: HealthCheckRequest, grpc_context: GrpcContext) -> HealthCheckResponse:
        """SERVING while some lane can generate."""
        if request.service not in _SERVICES:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(f"unknown service {request.service!r}")
            return HealthCheckResponse()
        return HealthCheckResponse(status=self._health(request.service))

    async def Watch(
        self, request: HealthCheckRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        """The status now and at every change, until the client leaves."""
        last = None
        while True:
            status = self._health(request.service)
            if status != last:
                last = status
                yield HealthCheckResponse(status=status)
            await asyncio.sleep(HEALTH_POLL_S)

    async def List(self, request: HealthListRequest, grpc_context: GrpcContext) -> HealthListResponse:
        statuses = {name: HealthCheckResponse(status=self._health(name)) for name in _SERVICES}
        return HealthListResponse(statuses=statuses)

    def _health(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in _SERVICES:
            return HealthCheckResponse.SERVICE_UNKNOWN
        ready = self.inference_service.ready()
        return HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING

    def _check(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        """Raises what HTTP does before it parses a body: Overloaded, BodyTooLarge."""
        self.inference_service.check_room()
        size, most = request.ByteSize(), self.inference_service.max_body_bytes
        if size > most:
            raise BodyTooLarge("", None, f"the request has {size} bytes, which is more than the limit of {most}")

    async def _accept_generate(self, request: pb.GenerateRequest, *, stream: bool) -> GenerationStream:
        self._check(request)
        # Through the HTTP schema, so that both frontends accept and refuse the same.
        fields = _shared_fields(request, stream)
        kind = request.WhichOneof("prompt")
        if kind is not None:
            fields["prompt"] = request.text if kind == "text" else list(request.token_ids.ids)
        return await self.inference_service.complete(CompletionRequest.parse(fields))

    async def _accept_chat(self, request: pb.ChatRequest, *, stream: bool) -> GenerationStream:
        self._check(request)
        fields = _shared_fields(request, stream)
        fields["messages"] = [_message(message) for message in request.messages]
        if (count := fields.pop("logprobs", None)) is not None:
            fields["logprobs"], fields["top_logprobs"] = True, count
        if request.tools:
            fields["tools"] = [_tool(i, tool) for i, tool in enumerate(request.tools)]
        if request.tool_choice in ("auto", "none", "required"):
            fields["tool_choice"] = request.tool_choice
        elif request.tool_choice:
            fields["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
        if request.HasField("parallel_tool_calls"):
            fields["parallel_tool_calls"] = request.parallel_tool_calls
        if request.HasField("chat_template_kwargs"):
            fields["chat_template_kwargs"] = json_format.MessageToDict(request.chat_template_kwargs)
        return await self.inference_service.chat(ChatRequest.parse(fields))


# ---- requests


def _shared_fields(request: pb.GenerateRequest | pb.ChatRequest, stream: bool) -> dict[str, Any]:
    """The fields that are set; HTTP has the same names."""
    fields: dict[str, Any] = {"stream": stream}
    if request.model:
        fields["model"] = request.model
    for name in ("timeout", "priority"):
        if request.HasField(name):
            fields[name] = getattr(request, name)
    for descriptor, value in request.sampling.ListFields():
        if descriptor.name == "logit_bias":
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in value.items()}
        elif descriptor.name == "structured_outputs":
            constraint = value.WhichOneof("form")
            content = list(value.choice.texts) if constraint == "choice" else getattr(value, constraint or "json")
            fields["structured_outputs"] = {constraint: content} if constraint else {}
        else:
            fields[descriptor.name] = value if isinstance(value, (bool, int, float)) else list(value)
    return fields


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.reasoning:
        fields["reasoning"] = message.reasoning
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _tool(i: int, tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        try:
            function["parameters"] = json.loads(tool.parameters)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"tools[{i}].parameters", tool.parameters, f"is not valid JSON: {error}") from error
    return {"type": "function", "function": function}


# ---- responses


async def _whole(
    accepting: Awaitable[GenerationStream],
    response: type[ResponseT],
    choice: Callable[..., Any],
    content: Callable[[OutputProcessor], dict[str, Any]],
    grpc_context: GrpcContext,
) -> ResponseT:
    """choice: the type of a choice. content: its text or message field."""
    try:
        stream = await accepting
        await stream.collect()
    except Exception as error:
        _fail(grpc_context, error)
        return response()
    choices = [
        choice(
            index=one.index,
            finish_reason=one.finish_reason,
            logprobs=_logprobs(one.logprobs),
            prompt_logprobs=_logprobs(one.prompt_logprobs or ()),
            token_ids=one.token_ids,
            seed=one.seed,
            **content(one),
        )
        for one in stream.choices
    ]
    return response(
        id=stream.id,
        model=stream.model,
        created=stream.created,
        choices=choices,
        usage=_usage(stream),
        system_fingerprint=stream.system_fingerprint,
    )


async def _chunks(
    accepting: Awaitable[GenerationStream],
    chunk: type[ChunkT],
    content: Callable[[TextDelta], dict[str, Any]],
    grpc_context: GrpcContext,
) -> AsyncGenerator[ChunkT, None]:
    """Deltas, then the usage. content: the text or message fields of a chunk."""
    try:
        stream = await accepting
        async with aclosing(stream.deltas()) as deltas:
            async for delta in deltas:
                yield chunk(
                    id=stream.id,
                    index=delta.index,
                    finish_reason=delta.finish_reason or "",
                    logprobs=_logprobs(delta.logprobs),
                    token_ids=delta.token_ids,
                    seed=stream.choices[delta.index].seed if delta.finish_reason else 0,
                    **content(delta),
                )
        yield chunk(id=stream.id, usage=_usage(stream), system_fingerprint=stream.system_fingerprint)
    except Exception as error:
        _fail(grpc_context, error)


def _text(output: OutputProcessor | TextDelta) -> dict[str, Any]:
    return {"text": output.text}


def _message_of_choice(choice: OutputProcessor) -> dict[str, Any]:
    calls = [
        pb.ToolCall(index=i, id=call.id, name=call.name, arguments=call.arguments)
        for i, call in enumerate(choice.tool_calls)
    ]
    message = pb.ChatMessage(role="assistant", content=choice.text, tool_calls=calls, reasoning=choice.reasoning)
    return {"message": message}


def _message_of_delta(delta: TextDelta) -> dict[str, Any]:
    calls = [
        pb.ToolCall(index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments)
        for call in delta.tool_calls
    ]
    return {"content": delta.text, "tool_calls": calls, "reasoning": delta.reasoning}


def _logprobs(logprobs: Sequence[DecodedLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=entry.token_id, text=entry.bytes, logprob=entry.logprob, rank=entry.rank, top=_logprobs(entry.top)
        )
        for entry in logprobs
    ]


def _usage(stream: GenerationStream) -> pb.Usage:
    usage = stream.usage
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        reasoning_tokens=usage.completion_tokens_details.reasoning_tokens,
    )


def _fail(grpc_context: GrpcContext, error: Exception) -> None:
    report = report_error(error)
    grpc_context.set_code(report.kind.grpc_code)
    grpc_context.set_details(report.message)

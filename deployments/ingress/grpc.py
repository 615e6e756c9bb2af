"""The gRPC frontend around an InferenceService: text by `stagemesh.v1.Inference`, and `grpc.health.v1.Health`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse

from stagemesh.deployments.ingress.auth import ApiKeys, guarded
from stagemesh.deployments.ingress.grpc_kserve import KServeRpcs
from stagemesh.deployments.ingress.grpc_requests import chat_fields, generate_fields
from stagemesh.deployments.ingress.grpc_rpc import Call, GrpcContext, streamed, unary
from stagemesh.deployments.ingress.grpc_service import ServiceRpcs
from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.deployments.proto import grpc_predict_v2_pb2 as kserve
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.stages.text.output import DecodedLogprob, OutputProcessor, TextDelta

HEALTH_POLL_S = 0.5

ResponseT = TypeVar("ResponseT", pb.GenerateResponse, pb.ChatResponse)
ChunkT = TypeVar("ChunkT", pb.GenerateChunk, pb.ChatChunk)

_SERVICES = (
    "",
    pb.DESCRIPTOR.services_by_name["Inference"].full_name,
    kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)


@guarded
class GrpcApi(ServiceRpcs, KServeRpcs):
    """A mixin for the ingress deployment, which sets `inference_service` and `api_keys`.

    Every rpc of a subclass asks for a key, unless it is one of health's.
    """

    api_keys = ApiKeys()

    def __init_subclass__(cls) -> None:
        guarded(cls)

    @unary(pb.GenerateResponse)
    async def Generate(self, request: pb.GenerateRequest, grpc_context: GrpcContext) -> pb.GenerateResponse:
        with self.calls.enter(request.request_id) as call:
            accept = partial(self._accept_generate, request, stream=False)
            return await _whole(call, accept, pb.GenerateResponse, pb.GenerateChoice, _text, request.request_id)

    @streamed
    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        with self.calls.enter(request.request_id) as call:
            accept = partial(self._accept_generate, request, stream=True)
            async with aclosing(_chunks(call, accept, pb.GenerateChunk, _text, request.request_id)) as chunks:
                async for chunk in chunks:
                    yield chunk

    @unary(pb.ChatResponse)
    async def Chat(self, request: pb.ChatRequest, grpc_context: GrpcContext) -> pb.ChatResponse:
        with self.calls.enter(request.request_id) as call:
            accept = partial(self._accept_chat, request, stream=False)
            return await _whole(call, accept, pb.ChatResponse, pb.ChatChoice, _message_of_choice, request.request_id)

    @streamed
    async def ChatStream(
        self, request: pb.ChatRequest, grpc_context: GrpcContext
    ) -> AsyncGenerator[pb.ChatChunk, None]:
        with self.calls.enter(request.request_id) as call:
            accept = partial(self._accept_chat, request, stream=True)
            async with aclosing(_chunks(call, accept, pb.ChatChunk, _message_of_delta, request.request_id)) as chunks:
                async for chunk in chunks:
                    yield chunk

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

    async def _accept_generate(self, request: pb.GenerateRequest, *, stream: bool) -> GenerationStream:
        # Through the HTTP schema, so that both frontends accept and refuse the same.
        self.inference_service.check_room()
        return await self.inference_service.complete(CompletionRequest.parse(generate_fields(request, stream)))

    async def _accept_chat(self, request: pb.ChatRequest, *, stream: bool) -> GenerationStream:
        self.inference_service.check_room()
        return await self.inference_service.chat(ChatRequest.parse(chat_fields(request, stream)))


async def _whole(
    call: Call,
    accept: Callable[[], Awaitable[GenerationStream]],
    response: type[ResponseT],
    choice: Callable[..., Any],
    content: Callable[[OutputProcessor], dict[str, Any]],
    request_id: str,
) -> ResponseT:
    """choice: the type of a choice. content: its text or message field."""
    stream = await call.wait(accept)
    await call.wait(stream.collect)
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
        id=request_id or stream.id,
        model=stream.model,
        created=stream.created,
        choices=choices,
        usage=_usage(stream),
        system_fingerprint=stream.system_fingerprint,
    )


async def _chunks(
    call: Call,
    accept: Callable[[], Awaitable[GenerationStream]],
    chunk: type[ChunkT],
    content: Callable[[TextDelta], dict[str, Any]],
    request_id: str,
) -> AsyncGenerator[ChunkT, None]:
    """Deltas, then the usage. content: the text or message fields of a chunk."""
    stream = await call.wait(accept)
    id = request_id or stream.id
    async with aclosing(stream.deltas()) as deltas:
        while (delta := await call.wait(partial(anext, deltas, None))) is not None:
            yield chunk(
                id=id,
                index=delta.index,
                finish_reason=delta.finish_reason or "",
                logprobs=_logprobs(delta.logprobs),
                token_ids=delta.token_ids,
                seed=stream.choices[delta.index].seed if delta.finish_reason else 0,
                **content(delta),
            )
    yield chunk(id=id, usage=_usage(stream), system_fingerprint=stream.system_fingerprint)


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

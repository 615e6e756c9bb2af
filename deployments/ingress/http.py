"""The HTTP frontend: OpenAI's API as a Starlette app around an InferenceService."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope

from stagemesh.deployments.ingress.connection import AbortableResponse, Connection
from stagemesh.deployments.ingress.errors import BodyTooLarge, ErrorReport, openai_error, report_error
from stagemesh.deployments.ingress.service import GenerationStream, InferenceService
from stagemesh.deployments.ingress.sse import WAITING, ChatChunks, ChunkWriter, CompletionChunks, event
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest, InferenceRequest
from stagemesh.deployments.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatResponse,
    CompletionChoice,
    CompletionResponse,
    FunctionCall,
    ModelList,
    PromptLogprobs,
    ToolCall,
)
from stagemesh.deployments.openai.schema import OpenAIRequest
from stagemesh.stages.text.output import OutputProcessor

MAX_DISCARDED_BYTES = 32 << 20
"""Read and dropped of a body that is too large, before the connection is closed."""

RequestT = TypeVar("RequestT", bound=OpenAIRequest)


def build_http_app(service: InferenceService) -> Starlette:
    """All routes. Errors, those of routing too, are OpenAI error objects."""
    api = HttpApi(service)
    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/embeddings", api.embeddings, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/ready", api.ready, methods=["GET"]),
            Route("/metrics", api.metrics, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _routing_error},
    )


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class HttpApi:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        async def accept(body: CompletionRequest) -> Response:
            return _response(body, await self._service.complete(body), CompletionChunks, _completion_response)

        return await self._accept(request, CompletionRequest, accept)

    async def chat_completions(self, request: Request) -> Response:
        async def accept(body: ChatRequest) -> Response:
            return _response(body, await self._service.chat(body), ChatChunks, _chat_response)

        return await self._accept(request, ChatRequest, accept)

    async def embeddings(self, request: Request) -> Response:
        async def accept(body: EmbeddingRequest) -> Response:
            return WholeResponse(lambda: self._service.embed(body))

        return await self._accept(request, EmbeddingRequest, accept)

    async def models(self, request: Request) -> Response:
        return JSON(ModelList(self._service.models()))

    async def model(self, request: Request) -> Response:
        try:
            return JSON(self._service.model(request.path_params["name"]))
        except Exception as error:
            return _error_response(report_error(error))

    async def health(self, request: Request) -> Response:
        return JSON({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while some lane can generate, else 503."""
        if self._service.ready():
            return JSON({"status": "ready"})
        error = openai_error("no lane can generate yet", type="server_error", code="no_lane")
        return JSON(error, 503, headers={"retry-after": "1"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _accept(
        self, request: Request, schema: type[RequestT], accept: Callable[[RequestT], Awaitable[Response]]
    ) -> Response:
        """Validate the request; the model runs when the returned response is called."""
        try:
            self._service.check_room()  # first, so that a refusal costs next to nothing
            return await accept(schema.parse(await _read_body(request, self._service.max_body_bytes)))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        except Exception as error:
            return _error_response(report_error(error))


class WholeResponse(AbortableResponse):
    """`compute()` as one JSON object."""

    def __init__(self, compute: Callable[[], Awaitable[msgspec.Struct]]) -> None:
        super().__init__()
        self._compute = compute

    async def _run(self, scope: Scope, receive: Receive, connection: Connection) -> None:
        response: Response
        try:
            response = JSON(await self._compute())
        except Exception as error:
            response = _error_response(report_error(error))
        await response(scope, receive, connection.send)


class StreamedResponse(AbortableResponse):
    """Server-sent events, one write per delta, and a comment where nothing comes for a while.

    What fails at once gets its own status. The head is sent as soon as nothing did: a later error, also one before the
    first delta, is an event with the error object, and the stream ends without [DONE].
    """

    keep_alive = WAITING

    def __init__(self, stream: GenerationStream, chunks: ChunkWriter) -> None:
        super().__init__()
        self._stream = stream
        self._chunks = chunks
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]

    async def _run(self, scope: Scope, receive: Receive, connection: Connection) -> None:
        try:
            async with aclosing(self._stream.deltas()) as deltas:
                async for delta in deltas:
                    await connection.body(self._chunks.delta(delta))
            last = self._chunks.end()
        except ClientDisconnect:
            raise
        except Exception as error:
            report = report_error(error)
            if not connection.is_started:
                await _error_response(report)(scope, receive, connection.send)
                return
            last = event(report.body())
        await connection.body(last, more=False)


def _response(
    body: InferenceRequest,
    stream: GenerationStream,
    writer: type[ChunkWriter],
    whole: Callable[[GenerationStream, bool], msgspec.Struct],
) -> Response:
    return_token_ids = body.return_token_ids is True
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage is True
        return StreamedResponse(stream, writer(stream, include_usage=include_usage, return_token_ids=return_token_ids))

    async def collected() -> msgspec.Struct:
        await stream.collect()
        return whole(stream, return_token_ids)

    return WholeResponse(collected)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Raises BodyTooLarge for more than `max_bytes`.

    A body somewhat too large is still read to its end: else the closing server would reset the connection, and the
    client, still sending, would not see the error.
    """
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    parts: list[bytes] = []
    if size <= max_bytes + MAX_DISCARDED_BYTES:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > max_bytes + MAX_DISCARDED_BYTES:
                break
            if size <= max_bytes:
                parts.append(part)
            else:
                parts.clear()
    if size > max_bytes:
        raise BodyTooLarge("", None, f"the request body is larger than the limit of {max_bytes} bytes")
    return b"".join(parts)


def _completion_response(stream: GenerationStream, return_token_ids: bool) -> CompletionResponse:
    choices = [
        CompletionChoice(
            choice.index,
            choice.text,
            choice.finish_reason,
            choice.seed,
            completion_logprobs(choice.logprobs) if choice.request.params.logprobs is not None else None,
            _prompt_logprobs(choice),
            choice.token_ids if return_token_ids else msgspec.UNSET,
            choice.request.prompt_token_ids if return_token_ids else msgspec.UNSET,
        )
        for choice in stream.choices
    ]
    return CompletionResponse(stream.id, stream.created, stream.model, choices, stream.usage, stream.system_fingerprint)


def _chat_response(stream: GenerationStream, return_token_ids: bool) -> ChatResponse:
    choices = [
        ChatChoice(
            choice.index,
            _assistant_message(choice),
            choice.finish_reason,
            choice.seed,
            chat_logprobs(choice.logprobs) if choice.request.params.logprobs is not None else None,
            choice.token_ids if return_token_ids else msgspec.UNSET,
        )
        for choice in stream.choices
    ]
    return ChatResponse(
        stream.id,
        stream.created,
        stream.model,
        choices,
        stream.usage,
        stream.system_fingerprint,
        prompt_logprobs=_prompt_logprobs(stream.choices[0]),
        prompt_token_ids=stream.choices[0].request.prompt_token_ids if return_token_ids else msgspec.UNSET,
    )


def _assistant_message(choice: OutputProcessor) -> AssistantMessage:
    calls = [ToolCall(call.id, FunctionCall(call.name, call.arguments)) for call in choice.tool_calls]
    reasoning = choice.reasoning or msgspec.UNSET
    return AssistantMessage(
        choice.text or (None if calls or choice.reasoning else ""),
        tool_calls=calls or msgspec.UNSET,
        reasoning=reasoning,
        reasoning_content=reasoning,
    )


def _prompt_logprobs(choice: OutputProcessor) -> PromptLogprobs | msgspec.UnsetType:
    return msgspec.UNSET if choice.prompt_logprobs is None else prompt_logprobs(choice.prompt_logprobs)


def _error_response(report: ErrorReport) -> Response:
    response = JSON(report.body(), report.kind.http_status)
    if report.retry_after_s is not None:
        response.headers["retry-after"] = str(report.retry_after_s)
    if report.kind.http_status == 413:
        # The rest of the body may be on its way; there is no next request on this connection.
        response.headers["connection"] = "close"
    return response


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {404: f"{request.url.path} is not served here", 405: f"{request.method} is not allowed here"}
    message = reasons.get(error.status_code, error.detail)
    return JSON(openai_error(message), error.status_code, headers=error.headers)

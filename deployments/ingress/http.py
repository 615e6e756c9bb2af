"""The HTTP frontend: OpenAI's API around an InferenceService. app.py has the routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from stagemesh.deployments.ingress.answers import chat_response, completion_response
from stagemesh.deployments.ingress.connection import AbortableResponse, Connection
from stagemesh.deployments.ingress.errors import BodyTooLarge, ErrorReport, NotJson, openai_error, report_error
from stagemesh.deployments.ingress.service import GenerationStream, InferenceService
from stagemesh.deployments.ingress.sse import WAITING, ChatChunks, ChunkWriter, CompletionChunks
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest, InferenceRequest
from stagemesh.deployments.openai.responses import ChatResponse, ModelList
from stagemesh.deployments.openai.schema import OpenAIRequest
from stagemesh.stages.text.output import TextDelta

LARGE_BODY_BYTES = 1 << 20
"""Larger ones are parsed on another thread: ten megabytes of token ids take 0.4 s."""
MAX_DISCARDED_BYTES = 32 << 20
"""Read and dropped of a body that is too large, before the connection is closed."""

RequestT = TypeVar("RequestT", bound=OpenAIRequest)
BodyT = TypeVar("BodyT", bound=InferenceRequest)
Refuse = Callable[[ErrorReport], Response]
"""Writes an error in the shape of one API."""


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class HttpApi:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def completions(self, request: Request) -> Response:
        return await self._accept(request, CompletionRequest, self._complete)

    async def chat_completions(self, request: Request) -> Response:
        return await self._accept(request, ChatRequest, self._chat)

    async def embeddings(self, request: Request) -> Response:
        return await self._accept(request, EmbeddingRequest, self._embed)

    async def _complete(self, body: CompletionRequest) -> Response:
        return _response(body, await self._service.complete(body), CompletionChunks, completion_response)

    async def _chat(self, body: ChatRequest) -> Response:
        return _response(body, await self._service.chat(body), ChatChunks, chat_response)

    async def _embed(self, body: EmbeddingRequest) -> Response:
        return WholeResponse(lambda: self._service.embed(body), error_response)

    def _chat_answer(self, body: ChatRequest, stream: GenerationStream) -> ChatResponse:
        return chat_response(stream, body)

    async def models(self, request: Request) -> Response:
        return JSON(ModelList(self._service.models()))

    async def model(self, request: Request) -> Response:
        try:
            return JSON(self._service.model(request.path_params["name"]))
        except Exception as error:
            return error_response(report_error(error))

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
        self,
        request: Request,
        schema: type[RequestT],
        accept: Callable[[RequestT], Awaitable[Response]],
        *,
        refuse: Refuse | None = None,
        is_for_lanes: bool = True,
    ) -> Response:
        """Validate the request; the model runs when the returned response is called.

        refuse: writes errors, by default OpenAI's. is_for_lanes: not while they have no room.
        """
        try:
            if is_for_lanes:
                self._service.check_room()  # first, so that a refusal costs next to nothing
            _check_content_type(request.headers.get("content-type", ""))
            content = await _read_body(request, self._service.max_body_bytes)
            parse = partial(schema.parse, content, strict_fields=self._service.strict_fields)
            body = await asyncio.to_thread(parse) if len(content) > LARGE_BODY_BYTES else parse()
            return await accept(body)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        except Exception as error:
            return (refuse or error_response)(report_error(error))


class EventWriter(Protocol):
    """The events of one stream."""

    def delta(self, delta: TextDelta) -> bytes: ...

    def end(self) -> bytes: ...

    def error(self, report: ErrorReport) -> bytes:
        """What ends the stream instead."""


class WholeResponse(AbortableResponse):
    """`compute()` as one JSON object."""

    def __init__(self, compute: Callable[[], Awaitable[msgspec.Struct]], refuse: Refuse) -> None:
        super().__init__()
        self._compute = compute
        self._refuse = refuse

    async def _run(self, scope: Scope, receive: Receive, connection: Connection) -> None:
        response: Response
        try:
            response = JSON(await self._compute())
        except Exception as error:
            response = self._refuse(report_error(error))
        await response(scope, receive, connection.send)


class StreamedResponse(AbortableResponse):
    """Server-sent events, one write per delta, and a comment where nothing comes for a while.

    What fails at once gets its own status. The head is sent as soon as nothing did: a later error, also one before the
    first delta, is an event with the error object.
    """

    keep_alive = WAITING

    def __init__(self, stream: GenerationStream, chunks: EventWriter, refuse: Refuse) -> None:
        super().__init__()
        self._stream = stream
        self._chunks = chunks
        self._refuse = refuse
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
                await self._refuse(report)(scope, receive, connection.send)
                return
            last = self._chunks.error(report)
        await connection.body(last, more=False)


def _response(
    body: BodyT,
    stream: GenerationStream,
    writer: Callable[[GenerationStream, BodyT], ChunkWriter],
    whole: Callable[[GenerationStream, BodyT], msgspec.Struct],
) -> Response:
    if body.stream:
        return StreamedResponse(stream, writer(stream, body), error_response)

    async def collected() -> msgspec.Struct:
        await stream.collect()
        return whole(stream, body)

    return WholeResponse(collected, error_response)


def _check_content_type(content_type: str) -> None:
    """Where there is none, the body tells. Raises NotJson."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise NotJson("Content-Type", content_type, "must be application/json")


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


def error_response(report: ErrorReport) -> Response:
    response = JSON(report.body(), report.kind.http_status)
    if report.retry_after_s is not None:
        response.headers["retry-after"] = str(report.retry_after_s)
    if report.kind.http_status == 413:
        # The rest of the body may be on its way; there is no next request on this connection.
        response.headers["connection"] = "close"
    return response

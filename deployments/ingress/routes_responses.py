"""/v1/responses: OpenAI's newer form of a chat, stateless, and its typed events."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.answer_items import Events, Item, ItemEvents
from stagemesh.deployments.ingress.errors import ErrorReport
from stagemesh.deployments.ingress.http import HttpApi, StreamedResponse, WholeResponse, error_response
from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.responses_request import RESPONSES_NAMES, ResponsesRequest


class OutputItem(msgspec.Struct, frozen=True):
    """A message, or a function_call."""

    id: str
    type: str
    status: str
    role: str | msgspec.UnsetType = msgspec.UNSET
    content: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    call_id: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str | msgspec.UnsetType = msgspec.UNSET


class ResponsesUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponsesResponse(msgspec.Struct, frozen=True):
    id: str
    created_at: int
    status: str
    """in_progress, completed, incomplete or failed"""
    model: str
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    usage: ResponsesUsage | None = None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    previous_response_id: None = None
    background: bool = False
    store: bool = False
    truncation: str = "disabled"
    object: str = "response"


class ResponsesRoutes(HttpApi):
    async def responses(self, request: Request) -> Response:
        return await self._accept(request, ResponsesRequest, self._respond)

    async def _respond(self, body: ResponsesRequest) -> Response:
        try:
            stream = await self._service.chat(body.chat())
        except ConfigError as error:
            raise error.renamed(RESPONSES_NAMES.get(error.field, error.field)) from None
        events = ResponsesEvents(stream, body)
        if body.stream:
            return StreamedResponse(stream, events, error_response)

        async def collected() -> ResponsesResponse:
            await events.collect()
            return events.response()

        return WholeResponse(collected, error_response)


class ResponsesEvents(ItemEvents):
    def __init__(self, stream: GenerationStream, request: ResponsesRequest) -> None:
        super().__init__(stream)
        self._request = request
        self._id = "resp_" + uuid.uuid4().hex
        self._ids: list[str] = []
        self._number = 0

    def response(self, *, error: ErrorReport | None = None) -> ResponsesResponse:
        """As it stands."""
        request, params = self._request, self.choice.request.params
        is_done = self.choice.finish_reason is not None
        status = "completed" if is_done else "in_progress"
        if self.choice.finish_reason == "length":
            status = "incomplete"
        usage = self.stream.usage
        cached = {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0}
        return ResponsesResponse(
            id=self._id,
            created_at=self.stream.created,
            status="failed" if error else status,
            model=self.stream.model,
            output=[self._item(item, _status(item)) for item in self.items] if is_done or error else [],
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=params.temperature,
            top_p=params.top_p,
            text=request.text or {"format": {"type": "text"}},
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            usage=ResponsesUsage(
                usage.prompt_tokens, cached, usage.completion_tokens, {"reasoning_tokens": 0}, usage.total_tokens
            )
            if is_done
            else None,
            error={"code": _error_code(error), "message": error.message} if error else None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
        )

    def _item(self, item: Item, status: str) -> OutputItem:
        id = self._ids[item.index]
        if item.name is not None:
            arguments = "" if status == "in_progress" else item.text
            return OutputItem(id, "function_call", status, call_id=item.call_id, name=item.name, arguments=arguments)
        content = [] if status == "in_progress" else [_text_part(item.text)]
        return OutputItem(id, "message", status, role="assistant", content=content)

    def _first(self) -> Events:
        return [self._event("created", response=self.response()), self._event("in_progress", response=self.response())]

    def _opened(self, item: Item) -> Events:
        self._ids.append(("msg_" if item.name is None else "fc_") + uuid.uuid4().hex)
        events = [self._event("output_item.added", output_index=item.index, item=self._item(item, "in_progress"))]
        if item.name is None:
            events.append(self._event("content_part.added", **self._place(item), part=_text_part("")))
        return events

    def _added(self, item: Item, text: str) -> Events:
        if item.name is None:
            return [self._event("output_text.delta", **self._place(item), delta=text, logprobs=[])]
        return [self._event("function_call_arguments.delta", **self._place(item), delta=text)]

    def _closed(self, item: Item) -> Events:
        place = self._place(item)
        if item.name is None:
            events = [
                self._event("output_text.done", **place, text=item.text, logprobs=[]),
                self._event("content_part.done", **place, part=_text_part(item.text)),
            ]
        else:
            events = [self._event("function_call_arguments.done", **place, name=item.name, arguments=item.text)]
        whole = self._item(item, _status(item))
        return [*events, self._event("output_item.done", output_index=item.index, item=whole)]

    def _last(self) -> Events:
        response = self.response()
        return [self._event(response.status, response=response)]

    def _failed(self, report: ErrorReport) -> Events:
        return [self._event("failed", response=self.response(error=report))]

    def _place(self, item: Item) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._ids[item.index], "output_index": item.index}
        return place if item.name is not None else {**place, "content_index": 0}

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}


def _status(item: Item) -> str:
    return "incomplete" if item.is_cut else "completed"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _error_code(report: ErrorReport) -> str:
    """One of those that OpenAI's clients know."""
    status = report.kind.http_status
    return "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status < 500 else "server_error"

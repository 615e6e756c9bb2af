"""/v1/messages: Anthropic's form of a chat, and its events."""

from __future__ import annotations

import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.anthropic.messages import (
    MESSAGES_NAMES,
    CountTokensRequest,
    Message,
    MessagesRequest,
    MessagesUsage,
    TokenCount,
    anthropic_error,
    arguments_of,
)
from stagemesh.deployments.ingress.answer_items import Events, Item, ItemEvents
from stagemesh.deployments.ingress.errors import ErrorReport
from stagemesh.deployments.ingress.http import JSON, HttpApi, StreamedResponse, WholeResponse, error_response
from stagemesh.deployments.ingress.service import GenerationStream


class MessagesRoutes(HttpApi):
    async def messages(self, request: Request) -> Response:
        return await self._accept(request, MessagesRequest, self._message, refuse=refuse)

    async def count_tokens(self, request: Request) -> Response:
        return await self._accept(request, CountTokensRequest, self._count, refuse=refuse, is_for_lanes=False)

    async def _message(self, body: MessagesRequest) -> Response:
        try:
            stream = await self._service.chat(body.chat())
        except ConfigError as error:
            raise error.renamed(MESSAGES_NAMES.get(error.field, error.field)) from None
        events = MessageEvents(stream)
        if body.stream:
            return StreamedResponse(stream, events, refuse)

        async def collected() -> Message:
            await events.collect()
            return events.message()

        return WholeResponse(collected, refuse)

    async def _count(self, body: CountTokensRequest) -> Response:
        prompt = await self._service.chat_prompt(body.chat())
        return JSON(TokenCount(len(prompt.token_ids)))


class MessageEvents(ItemEvents):
    def __init__(self, stream: GenerationStream) -> None:
        super().__init__(stream)
        self._id = "msg_" + uuid.uuid4().hex

    def message(self) -> Message:
        """As it stands."""
        content = [_block(item, item.text) for item in self.items]
        return Message(self._id, self.stream.model, content, *self._stop(), self._usage())

    def _stop(self) -> tuple[str | None, str | None]:
        """stop_reason, stop_sequence"""
        reason, stop = self.choice.finish_reason, self.choice.stop_reason
        if reason == "length":
            return "max_tokens", None
        if reason is not None and self.choice.tool_calls:
            return "tool_use", None
        if isinstance(stop, str):
            return "stop_sequence", stop
        return None if reason is None else "end_turn", None

    def _usage(self) -> MessagesUsage:
        usage = self.stream.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return MessagesUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)

    def _first(self) -> Events:
        message = Message(self._id, self.stream.model, [], None, None, self._usage())
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def _opened(self, item: Item) -> Events:
        return [{"type": "content_block_start", "index": item.index, "content_block": _block(item, "")}]

    def _added(self, item: Item, text: str) -> Events:
        delta = {"type": "text_delta", "text": text}
        if item.name is not None:
            delta = {"type": "input_json_delta", "partial_json": text}
        return [{"type": "content_block_delta", "index": item.index, "delta": delta}]

    def _closed(self, item: Item) -> Events:
        return [{"type": "content_block_stop", "index": item.index}]

    def _last(self) -> Events:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [{"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}]

    def _failed(self, report: ErrorReport) -> Events:
        return [anthropic_error(report.message, report.kind.http_status)]


def refuse(report: ErrorReport) -> Response:
    """An error in Anthropic's shape, with the headers of OpenAI's."""
    response = error_response(report)
    body = anthropic_error(report.message, report.kind.http_status)
    headers = {name: response.headers[name] for name in ("retry-after", "connection") if name in response.headers}
    return JSON(body, response.status_code, headers=headers)


def _block(item: Item, text: str) -> dict[str, Any]:
    if item.name is None:
        return {"type": "text", "text": text}
    return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": arguments_of(text)}

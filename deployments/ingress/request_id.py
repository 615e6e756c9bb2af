"""The id of an HTTP request: the client's X-Request-Id or a new one; in the answer, its header and the log."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stagemesh.deployments.openai.schema import MAX_REQUEST_ID_CHARS


class RequestId:
    """is_given: the client chose it, perhaps more than once."""

    def __init__(self, given: str | None = None) -> None:
        self.value = uuid.uuid4().hex
        self.is_given = False
        self.take(given)

    def take(self, given: str | None) -> None:
        """The client's, cut to what a log line and a header may hold. The first one counts."""
        known = re.sub(r"[^A-Za-z0-9._:~-]", "", given or "")[:MAX_REQUEST_ID_CHARS]
        if known and not self.is_given:
            self.value, self.is_given = known, True


current: ContextVar[RequestId | None] = ContextVar("request_id", default=None)
"""Of the HTTP request that this code works for."""


class RequestIds:
    """ASGI middleware: sets `current`, and the header of the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = RequestId(Headers(scope=scope).get("x-request-id"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id.value
            await send(message)

        token = current.set(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            current.reset(token)

"""A small HTTP client of the OpenAI API, of the standard library alone: the commands that ask a running server."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from stagemesh.config.errors import ConfigError

TIMEOUT_S = 3600.0
"""For an answer, or the next piece of a streamed one."""
MAX_ERROR_BYTES = 1 << 20


class ServerError(RuntimeError):
    """The server's own message about a request."""

    def __init__(self, status: int, body: Any, retry_after_s: float | None = None) -> None:
        error = body.get("error", body) if isinstance(body, Mapping) else body
        message = error.get("message", error) if isinstance(error, Mapping) else error
        super().__init__(f"{status}: {message}")
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s


class Client:
    """Any thread may use it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """url: of the server, with or without /v1. api_key: by default OPENAI_API_KEY."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError("url", url, "must begin with http:// or https://")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def get(self, path: str) -> bytes:
        """Raises ServerError, and ConfigError where no server answers."""
        with self._open(path, None) as response:
            return bytes(response.read())

    def post(self, path: str, body: Any) -> Any:
        """Raises ServerError, ConfigError."""
        with self._open(path, body) as response:
            return json.loads(response.read())

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Closing the iterator ends the request. Raises ServerError, ConfigError."""
        with self._open(path, {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue  # comments, which keep the connection alive, and empty lines
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(200, event)
                yield event

    def model(self, name: str | None) -> str:
        """`name`, or the first that is served."""
        return name or json.loads(self.get("/v1/models"))["data"][0]["id"]

    def _open(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise _server_error(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError("url", self.url, f"no server answers there: {reason}") from None


def _server_error(error: urllib.error.HTTPError) -> ServerError:
    content = error.read(MAX_ERROR_BYTES)
    try:
        body = json.loads(content)
    except ValueError:
        body = content.decode(errors="replace")
    wait = error.headers.get("Retry-After", "")
    return ServerError(error.code, body, float(wait) if wait.isdecimal() else None)

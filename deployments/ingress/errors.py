"""From an exception to HTTP status, OpenAI error object and gRPC code, for both frontends."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import msgspec

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress import request_id
from stagemesh.deployments.ingress.admission import Overloaded
from stagemesh.stages.messages.request import LaneError
from stagemesh.stages.text.input import PromptTooLong

logger = logging.getLogger(__name__)


class UnknownModel(ConfigError):
    """The request names an unknown model."""


class BodyTooLarge(ConfigError):
    """The request body exceeds the limit."""


class NotJson(ConfigError):
    """The request's Content-Type says that its body is something else."""


class ErrorKind(msgspec.Struct, frozen=True):
    """type, code: fields of OpenAI's error object."""

    http_status: int
    grpc_code: grpc.StatusCode
    type: str = "invalid_request_error"
    code: str | None = None
    retry_after_s: int | None = None
    """Sent as Retry-After."""


_INTERNAL = ErrorKind(500, grpc.StatusCode.INTERNAL, "server_error", "internal_error")

_BY_EXCEPTION: dict[type[Exception], ErrorKind] = {
    UnknownModel: ErrorKind(404, grpc.StatusCode.NOT_FOUND, code="model_not_found"),
    PromptTooLong: ErrorKind(400, grpc.StatusCode.INVALID_ARGUMENT, code="context_length_exceeded"),
    BodyTooLarge: ErrorKind(413, grpc.StatusCode.RESOURCE_EXHAUSTED, code="request_too_large"),
    NotJson: ErrorKind(415, grpc.StatusCode.INVALID_ARGUMENT),
    ConfigError: ErrorKind(400, grpc.StatusCode.INVALID_ARGUMENT),
}
_BY_LANE_STATUS: dict[str, ErrorKind] = {
    "unavailable": ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "server_error", "no_lane", retry_after_s=1),
    "overloaded": ErrorKind(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error", "overloaded", retry_after_s=1),
    "lost": ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "server_error", "lane_lost", retry_after_s=1),
    "timeout": ErrorKind(408, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_error", "timeout"),  # the client's own limit
    "internal": _INTERNAL,
}


class ErrorReport(msgspec.Struct, frozen=True):
    """An error as a client sees it."""

    kind: ErrorKind
    message: str
    param: str | None = None
    retry_after_s: int | None = None
    """Sent as Retry-After."""

    def body(self) -> dict[str, Any]:
        return openai_error(self.message, type=self.kind.type, param=self.param, code=self.kind.code)


def openai_error(
    message: str, *, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def report_error(error: Exception) -> ErrorReport:
    """Bugs of ours are logged here, once; the client gets no traceback."""
    if isinstance(error, LaneError):
        kind = _BY_LANE_STATUS[error.status]
        if kind is _INTERNAL:
            logger.error("a lane failed %s: %s", _request(), error)
        retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else kind.retry_after_s
        return ErrorReport(kind, str(error), retry_after_s=retry_after_s)
    if isinstance(error, ConfigError):
        kind = next(_BY_EXCEPTION[cls] for cls in type(error).__mro__ if cls in _BY_EXCEPTION)
        return ErrorReport(kind, str(error), error.field or None)
    logger.error("%s failed unexpectedly", _request(), exc_info=error)
    return ErrorReport(_INTERNAL, "internal server error; the server's log has the details")


def _request() -> str:
    current = request_id.current.get()
    return "a request" if current is None else f"request {current.value}"

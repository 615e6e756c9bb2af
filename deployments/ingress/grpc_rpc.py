"""What all rpcs share: one way in, errors with google.rpc's details, and calls that end by their request_id.

Serve calls the method named like the rpc, with the context as `grpc_context`. Errors are set on the context, because
Serve would log an exception with its traceback for every mistyped request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.errors import BodyTooLarge, report_error
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.proto.inference_pb2 import Sampling

MAX_MESSAGE_BYTES = 1000
"""Of an error's message. It travels three times, escaped, and clients refuse trailing metadata of more than 8 KiB."""
MAX_REQUEST_ID_CHARS = 128
STATUS_DETAILS = "grpc-status-details-bin"

ApiT = TypeVar("ApiT", bound="Rpcs")
RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ResultT = TypeVar("ResultT")


class GrpcContext(Protocol):
    """What RayServegRPCContext and grpc.aio.ServicerContext share."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...


class CallAborted(Exception):
    """Somebody ended the call by its request_id."""


class Call:
    """A running call, which `abort` may end while it waits for something."""

    def __init__(self) -> None:
        self._is_aborted = False
        self._waiting: asyncio.Task[Any] | None = None

    def abort(self) -> None:
        self._is_aborted = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def wait(self, start: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Its result. Raises CallAborted, having cancelled it. Never ends what the call's reader does between two."""
        if self._is_aborted:
            raise CallAborted
        task = self._waiting = asyncio.current_task()
        assert task is not None
        try:
            return await start()
        except asyncio.CancelledError:
            if self._is_aborted and task.uncancel() == 0:  # else somebody else cancels it too
                raise CallAborted from None
            raise
        finally:
            self._waiting = None


class Calls:
    """The running calls of a router by request_id, which several may share."""

    def __init__(self) -> None:
        self._by_id: dict[str, set[Call]] = {}

    @contextmanager
    def enter(self, request_id: str) -> Iterator[Call]:
        """A new one. Raises ConfigError for an id that is too long."""
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise ConfigError("request_id", request_id, f"must not have more than {MAX_REQUEST_ID_CHARS} characters")
        call = Call()
        if not request_id:
            yield call
            return
        calls = self._by_id.setdefault(request_id, set())
        calls.add(call)
        try:
            yield call
        finally:
            calls.discard(call)
            if not calls and self._by_id.get(request_id) is calls:
                del self._by_id[request_id]

    def abort(self, request_id: str) -> int:
        """How many there were."""
        calls = self._by_id.pop(request_id, set())
        for call in calls:
            call.abort()
        return len(calls)


class Rpcs:
    """Base of the mixins with rpcs. The ingress deployment sets `inference_service`."""

    inference_service: InferenceService
    calls = Calls()

    def check_size(self, request: Message) -> None:
        """Raises BodyTooLarge for what HTTP would not read."""
        size, most = request.ByteSize(), self.inference_service.max_body_bytes
        if size > most:
            raise BodyTooLarge("", None, f"the request has {size} bytes, which is more than the limit of {most}")


def unary(
    response: type[ResponseT],
) -> Callable[
    [Callable[[ApiT, RequestT, GrpcContext], Awaitable[ResponseT]]],
    Callable[[ApiT, RequestT, GrpcContext], Coroutine[Any, Any, ResponseT]],
]:
    """An rpc with one response. What it raises becomes the status of the call."""

    def decorate(
        rpc: Callable[[ApiT, RequestT, GrpcContext], Awaitable[ResponseT]],
    ) -> Callable[[ApiT, RequestT, GrpcContext], Coroutine[Any, Any, ResponseT]]:
        @wraps(rpc)
        async def answered(self: ApiT, request: RequestT, grpc_context: GrpcContext) -> ResponseT:
            try:
                assert isinstance(request, Message)
                self.check_size(request)
                return await rpc(self, request, grpc_context)
            except Exception as error:
                fail(grpc_context, error, request)
                return response()

        return answered

    return decorate


def streamed(
    rpc: Callable[[ApiT, RequestT, GrpcContext], AsyncGenerator[ResponseT, None]],
) -> Callable[[ApiT, RequestT, GrpcContext], AsyncGenerator[ResponseT, None]]:
    """The same for an rpc with many responses. One with a stream of requests checks their sizes itself."""

    @wraps(rpc)
    async def answered(self: ApiT, request: RequestT, grpc_context: GrpcContext) -> AsyncGenerator[ResponseT, None]:
        try:
            if isinstance(request, Message):
                self.check_size(request)
            async with aclosing(rpc(self, request, grpc_context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            fail(grpc_context, error, request)

    return answered


def fail(grpc_context: GrpcContext, error: Exception, request: object = None) -> None:
    """End the call with the error's code and message, and with details for programs to read."""
    if isinstance(error, CallAborted):
        grpc_context.set_code(grpc.StatusCode.CANCELLED)
        grpc_context.set_details("the call was aborted by its request_id")
        return
    report = report_error(error)
    message = _cut(report.message)
    status = status_pb2.Status(code=report.kind.grpc_code.value[0], message=message)
    if report.param is not None:
        field = error_details_pb2.BadRequest.FieldViolation(field=_cut(_path(report.param, request)))
        field.description = _cut(error.reason) if isinstance(error, ConfigError) else message
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[field]))
    if report.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(report.retry_after_s)
        status.details.add().Pack(retry)
    grpc_context.set_code(report.kind.grpc_code)
    grpc_context.set_details(message)
    grpc_context.set_trailing_metadata([(STATUS_DETAILS, status.SerializeToString())])


def error_message(error: Exception) -> str:
    """For a stream whose other requests go on."""
    return "the request was aborted by its id" if isinstance(error, CallAborted) else _cut(report_error(error).message)


def _path(field: str, request: object) -> str:
    """HTTP's name of a field as a path in `request`, where the sampling fields have a message of their own."""
    if not isinstance(request, Message):
        return field
    name = re.split(r"[.\[]", field, maxsplit=1)[0]
    own = request.DESCRIPTOR.fields_by_name
    is_sampling = name not in own and "sampling" in own and name in Sampling.DESCRIPTOR.fields_by_name
    return f"sampling.{field}" if is_sampling else field


def _cut(text: str) -> str:
    """Clients choose parts of it: other than UTF-8 is replaced."""
    data = text.encode("utf-8", "replace")
    return data[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + ("…" if len(data) > MAX_MESSAGE_BYTES else "")

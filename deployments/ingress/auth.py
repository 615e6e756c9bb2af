"""API keys in front of HTTP and gRPC, and CORS."""

from __future__ import annotations

import hashlib
import hmac
import inspect
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import wraps
from typing import Any, TypeVar

import grpc
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.anthropic.messages import anthropic_error
from stagemesh.deployments.ingress.errors import openai_error
from stagemesh.deployments.ingress.http import JSON

OPEN_PATHS = frozenset({"/health", "/ready"})
"""For whoever watches the service."""
OPEN_RPCS = frozenset({"Check", "Watch", "List"})
"""Those of grpc.health.v1."""
REASON = "a valid API key is needed: Authorization: Bearer KEY"

ClassT = TypeVar("ClassT", bound=type)


class ApiKeys:
    """Whose keys are served; everyone where there are none."""

    def __init__(self, hashes: Sequence[str] = ()) -> None:
        """hashes: SHA-256 in hex, of `EngineConfig.api_key_hashes`."""
        self._hashes = tuple(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def accept(self, authorization: str | None, x_api_key: str | None = None) -> bool:
        """authorization: "Bearer KEY". Takes the same time for all wrong keys."""
        scheme, _, key = (authorization or "").partition(" ")
        keys = [x_api_key or "", key if scheme.lower() == "bearer" else ""]
        digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
        equal = [hmac.compare_digest(digest, known) for digest in digests for known in self._hashes]
        return not self._hashes or any(equal)


class ApiKeyMiddleware:
    """401 before the body is read, for every path that is not open; also for those that do not exist."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_anthropic = _path(scope).startswith("/v1/messages")
        if self._keys.accept(headers.get("authorization"), headers.get("x-api-key") if is_anthropic else None):
            await self._app(scope, receive, send)
            return
        error = openai_error(REASON, code="invalid_api_key")
        content = anthropic_error(REASON, 401) if is_anthropic else error
        # The body stays unread, so there is no next request on this connection.
        refusal = JSON(content, 401, headers={"www-authenticate": "Bearer", "connection": "close"})
        await refusal(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        # What a browser asks before the request itself carries no key.
        return _path(scope) in OPEN_PATHS or scope.get("method") == "OPTIONS"


def middleware(config: EngineConfig) -> list[Middleware]:
    """The outermost first."""
    layers = []
    if config.allowed_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=config.allowed_methods,
                allow_headers=config.allowed_headers,
                allow_credentials=config.allow_credentials,
            )
        )
    if config.api_key_hashes:
        layers.append(Middleware(ApiKeyMiddleware, keys=ApiKeys(config.api_key_hashes)))
    return layers


def guarded(cls: ClassT) -> ClassT:
    """A class of rpcs, inherited ones too, that ask `self.api_keys` first: all but those of health."""
    for name in dir(cls):
        method = getattr(cls, name)
        if name[0].isupper() and name not in OPEN_RPCS and inspect.isfunction(method):
            setattr(cls, name, _guarded(method))
    return cls


def _guarded(rpc: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(rpc, "_is_guarded"):
        return rpc
    asking: Callable[..., Any]
    if inspect.isasyncgenfunction(rpc):

        @wraps(rpc)
        async def streaming(self: Any, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
            if not _refuse(self.api_keys, grpc_context):
                async with aclosing(rpc(self, request, grpc_context)) as chunks:
                    async for chunk in chunks:
                        yield chunk

        asking = streaming
    else:

        @wraps(rpc)
        async def unary(self: Any, request: Any, grpc_context: Any) -> Any:
            if _refuse(self.api_keys, grpc_context):
                return inspect.get_annotations(rpc, eval_str=True)["return"]()
            return await rpc(self, request, grpc_context)

        asking = unary
    vars(asking)["_is_guarded"] = True
    return asking


def _refuse(keys: ApiKeys, grpc_context: Any) -> bool:
    if not keys:
        return False
    metadata = {key: value for key, value in grpc_context.invocation_metadata() or () if isinstance(value, str)}
    if keys.accept(metadata.get("authorization")):
        return False
    grpc_context.set_code(grpc.StatusCode.UNAUTHENTICATED)
    grpc_context.set_details(REASON)
    return True


def _path(scope: Scope) -> str:
    """Below the prefix that Serve has the application at."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path

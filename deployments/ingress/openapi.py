"""/openapi.json: every route with the schemas of what it takes and gives, from the classes that parse and write it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import stagemesh

_REF = "#/components/schemas/{%s}"


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """OpenAI's."""

    error: ErrorBody


class MessagesErrorBody(msgspec.Struct):
    type: str
    message: str


class MessagesError(msgspec.Struct):
    """Anthropic's."""

    error: MessagesErrorBody
    type: str


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    methods: tuple[str, ...] = ("GET",)
    takes: type[BaseModel] | tuple[type[BaseModel], ...] = ()
    """One of these, as JSON."""
    gives: Any = None
    """JSON of this type, or one of several; None: something else."""
    streams: bool = False
    """Gives events if the request says stream: true."""
    error: type[Error] | type[MessagesError] | None = Error
    """Also for a key that is missing. None: never fails and needs no key."""
    has_unready: bool = False
    """Gives the same with 503 while no lane can generate."""

    def route(self) -> Route:
        return Route(self.path, self.handler, methods=list(self.methods))

    @property
    def requests(self) -> tuple[type[BaseModel], ...]:
        return self.takes if isinstance(self.takes, tuple) else (self.takes,)

    @property
    def answers(self) -> tuple[Any, ...]:
        gives = self.gives if isinstance(self.gives, tuple) else (self.gives,)
        return tuple(one for one in gives if one is not None)


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    models = list(dict.fromkeys(model for endpoint in endpoints for model in endpoint.requests))
    _, requests = models_json_schema([(model, "validation") for model in models], ref_template=_REF % "model")
    types = list(dict.fromkeys(t for one in endpoints for t in (*one.answers, one.error) if t is not None))
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF % "name")
    schema_of = dict(zip(types, schemas, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {"title": "stagemesh", "version": stagemesh.__version__},
        "paths": {one.path.replace("{name:path}", "{name}"): _operations(one, schema_of) for one in endpoints},
        "components": {
            "schemas": {**requests.get("$defs", {}), **components},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operations(endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": _responses(endpoint, schema_of)}
    if endpoint.error is not None:
        operation["security"] = [{"key": []}, {}]
    if "{name:path}" in endpoint.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    if endpoint.requests:
        schema = _any_of([{"$ref": f"#/components/schemas/{model.__name__}"} for model in endpoint.requests])
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {method.lower(): operation for method in endpoint.methods}


def _responses(endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {}}
    if endpoint.answers:
        content = {"application/json": {"schema": _any_of([schema_of[answer] for answer in endpoint.answers])}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    if endpoint.error is not None:
        error = {"application/json": {"schema": schema_of[endpoint.error]}}
        responses["4XX"] = {"description": "What is wrong with the request.", "content": error}
        responses["5XX"] = {"description": "What is wrong here.", "content": error}
    if endpoint.has_unready:
        responses["503"] = {"description": "No lane can generate yet.", "content": content}
    return responses


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

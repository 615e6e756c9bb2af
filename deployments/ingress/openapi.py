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
from stagemesh.config.sampling import INTEGERS, NO_LIMIT, NUMBERS
from stagemesh.deployments.ingress.auth import OPEN_PATHS
from stagemesh.deployments.openai.tokens import NOT_IN_BATCHES

_REF = "#/components/schemas/{%s}"
_REASONS = {
    "400": "A field is wrong; the message names it.",
    "401": "A valid API key is needed.",
    "404": "No such model is served.",
    "408": "The request's own timeout has passed.",
    "413": "The body is too large.",
    "415": "The body's Content-Type is not JSON.",
    "429": "The lanes have no room; Retry-After says when to come again.",
    "500": "What is wrong here.",
    "503": "No lane can generate yet.",
}
_EVENT = {
    "description": "Each event; its data is JSON, or [DONE] at the end of OpenAI's older streams.",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_RANGES: dict[str, tuple[float, float]] = {
    **INTEGERS,
    **NUMBERS,
    "max_tokens": (0, NO_LIMIT),  # 0 with echo: only the prompt
    "top_logprobs": INTEGERS["logprobs"],
}
"""Of the fields of these names, where they are numbers."""


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
    """None: never fails."""
    needs_lanes: bool = False
    """Fails where no lane can generate, has room, or answers in time."""
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
    schemas_of_requests = requests.get("$defs", {})
    _add_fields_of_batches(schemas_of_requests)
    for schema in schemas_of_requests.values():
        _add_ranges(schema)
    types = list(dict.fromkeys(t for one in endpoints for t in (*one.answers, one.error) if t is not None))
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF % "name")
    schema_of = dict(zip(types, schemas, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {"title": "stagemesh", "version": stagemesh.__version__},
        "paths": {one.path.replace("{name:path}", "{name}"): _operations(one, schema_of) for one in endpoints},
        "components": {
            "schemas": {**schemas_of_requests, **components},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operations(endpoint: Endpoint, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": _responses(endpoint, schema_of)}
    if endpoint.path not in OPEN_PATHS:
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
        content["text/event-stream"] = {"schema": _EVENT}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    if endpoint.error is not None:
        error = {"application/json": {"schema": schema_of[endpoint.error]}}
        for status in _statuses(endpoint):
            responses[status] = {"description": _REASONS[status], "content": error}
    if endpoint.has_unready:
        responses["503"] = {"description": _REASONS["503"], "content": content}
    return dict(sorted(responses.items()))


def _statuses(endpoint: Endpoint) -> set[str]:
    """Of errors."""
    statuses = {"500"}
    if endpoint.path not in OPEN_PATHS:
        statuses.add("401")
    if endpoint.requests:
        statuses |= {"400", "404", "413", "415"}
    if endpoint.needs_lanes:
        statuses |= {"408", "429", "503"} if endpoint.requests else {"503"}
    if "{name:path}" in endpoint.path:
        statuses.add("404")
    return statuses


def _add_fields_of_batches(schemas: dict[str, Any]) -> None:
    """A batch takes a chat's fields, which its class does not declare."""
    if (batch := schemas.get("BatchChatRequest")) is not None:
        chat = schemas["ChatRequest"]["properties"]
        shared = {name: field for name, field in chat.items() if name not in NOT_IN_BATCHES}
        batch["properties"] = {**shared, **batch["properties"]}


def _add_ranges(schema: dict[str, Any]) -> None:
    for name, (least, most) in _RANGES.items():
        field = schema.get("properties", {}).get(name, {})
        for branch in (field, *field.get("anyOf", ())):
            if branch.get("type") in ("integer", "number"):
                branch |= {"minimum": least, "maximum": most}
                if name == "top_p":
                    branch["exclusiveMinimum"] = branch.pop("minimum")


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

"""Tool calls in an answer, streamed as OpenAI's deltas: what they are, and calls that were forced.

Forced calls (`tool_choice` required, or naming a function) follow a JSON schema, whatever the model's own format;
tool_formats.py has the formats of free ones.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolCallDelta(msgspec.Struct, frozen=True):
    """Call `index` begins (with id and name), or gets more arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str
    """The next part of their JSON text."""


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    name: str
    arguments: str
    """JSON text so far."""


class ParsedText(NamedTuple):
    content: str
    """Text outside of calls."""
    calls: list[ToolCallDelta]


class ToolParser(Protocol):
    """Parses one answer. What it finds does not depend on how the text is cut into pieces."""

    def feed(self, text: str) -> ParsedText:
        """What became certain with `text`."""

    def finish(self) -> ParsedText:
        """What was held back."""


class OfferedTools:
    """The functions that an answer may call, whose parameters are any JSON that a client wrote."""

    def __init__(self, functions: Sequence[Mapping[str, Any]]) -> None:
        self._schemas = {function["name"]: _object(function.get("parameters")) for function in functions}

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    def required(self, name: str) -> set[str]:
        names = self._schemas[name].get("required")
        return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()

    def properties(self, name: str) -> Mapping[str, Any]:
        """Schemas of the arguments."""
        return _object(self._schemas[name].get("properties"))


def forced_calls_schema(functions: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """Of a list of calls, for `tool_formats.ListedCalls`."""
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = dict(function.get("parameters") or NO_PARAMETERS)
        definitions |= parameters.pop("$defs", {})  # references point to the root
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


class NamedParser:
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> ParsedText:
        if not text:
            return ParsedText("", [])
        name, self._name = self._name, None
        return ParsedText("", [ToolCallDelta(0, None if name is None else new_call_id(), name, text)])

    def finish(self) -> ParsedText:
        return ParsedText("", [])


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

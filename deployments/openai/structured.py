"""The form of an answer as requests ask for it: `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import StructuredOutputsParams


class JsonSchemaFormat(pydantic.BaseModel, extra="allow"):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = pydantic.Field(default=None, alias="schema")
    """None: any object."""
    strict: bool | None = None
    """The schema is enforced either way."""


class ResponseFormat(pydantic.BaseModel, extra="allow"):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(pydantic.BaseModel, extra="allow"):
    """vLLM's field; see `config.sampling.StructuredOutputsParams`."""

    json_: str | dict[str, Any] | None = pydantic.Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


def structured_outputs_params(
    structured: StructuredOutputs | None, format: ResponseFormat | None
) -> StructuredOutputsParams | None:
    """Raises ConfigError."""
    if structured is not None and structured.structural_tag is not None:
        raise ConfigError("structured_outputs.structural_tag", structured.structural_tag, "is not supported")
    if format is None or format.type == "text":
        if structured is None:
            return None
        fields = {name for name in type(structured).model_fields if name != "structural_tag"}
        return StructuredOutputsParams(**structured.model_dump(by_alias=True, include=fields))
    if structured is not None:
        raise ConfigError("response_format", format.type, "must not be given together with structured_outputs")
    if format.type == "structural_tag":
        reason = "is not supported; use json_schema, or structured_outputs with a grammar"
        raise ConfigError("response_format.type", format.type, reason)
    if format.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if format.json_schema is None:
        raise ConfigError("response_format.json_schema", None, "is required")
    schema = format.json_schema.json_schema
    return StructuredOutputsParams(json={"type": "object"} if schema is None else schema)

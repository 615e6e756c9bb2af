"""The form of an answer as requests ask for it: `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from llguidance import StructTag

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import StructuredOutputsParams


class JsonSchemaFormat(pydantic.BaseModel, extra="allow"):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = pydantic.Field(default=None, alias="schema")
    """None: any object."""
    strict: bool | None = None
    """The schema is enforced either way."""


class Structure(pydantic.BaseModel, extra="ignore"):
    """Between two texts, a value of a schema."""

    begin: str = pydantic.Field(min_length=1)
    json_schema: dict[str, Any] = pydantic.Field(alias="schema")
    end: str


class ResponseFormat(pydantic.BaseModel, extra="allow"):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Structure] | None = None
    """With structural_tag: free text that may hold any number of these."""
    triggers: list[str] | None = None
    """With structural_tag: what begins a structure, a prefix of its `begin`, commits the answer to one."""


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
        return StructuredOutputsParams(grammar=_tags_grammar(format))
    if format.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if format.json_schema is None:
        raise ConfigError("response_format.json_schema", None, "must be provided")
    schema = format.json_schema.json_schema
    return StructuredOutputsParams(json={"type": "object"} if schema is None else schema)


def _tags_grammar(format: ResponseFormat) -> str:
    """In Lark. Raises ConfigError."""
    if not format.structures or not format.triggers:
        reason = "needs structures and triggers; vLLM's newer form with `format` is not supported"
        raise ConfigError("response_format.type", format.type, reason)
    tags = []
    for i, structure in enumerate(format.structures):
        trigger = next((text for text in format.triggers if text and structure.begin.startswith(text)), None)
        if trigger is None:
            reason = f"must begin with one of the triggers {format.triggers}"
            raise ConfigError(f"response_format.structures[{i}].begin", structure.begin, reason)
        tags.append(StructTag(trigger=trigger, begin=structure.begin, grammar=structure.json_schema, end=structure.end))
    # The trigger is text: whether a tokenizer has a special token for it is not known here.
    return StructTag.to_grammar(tags, assume_special=False)

"""What answers to a JSON schema may hold."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import llguidance
import pytest

from stagemesh.stages.engine.json_schema import closed

INTEGER = {"type": "integer"}
A = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}}
REF_A: dict[str, Any] = {"$ref": "#/$defs/A"}


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        (A, [{"a": 1}], [{"a": 1, "z": 1}]),
        ({"properties": {"o": A}}, [{"o": {"a": 1}}], [{"o": {"a": 1, "z": 1}}, {"z": 1}]),
        ({"type": "array", "items": A}, [[{"a": 1}]], [[{"a": 1, "z": 1}]]),
        ({**A, "additionalProperties": True}, [{"a": 1, "z": 1}], [{"z": 1}]),
        ({**A, "additionalProperties": INTEGER}, [{"a": 1, "z": 1}], [{"a": 1, "z": "1"}]),
        ({"type": "object"}, [{"z": {"y": 1}}], []),
        ({"properties": {}}, [{}], [{"z": 1}]),
        ({"anyOf": [A, {"properties": {"b": INTEGER}}]}, [{"a": 1}, {"b": 1}], [{"a": 1, "z": 1}, {"b": 1, "z": 1}]),
        ({**REF_A, "$defs": {"A": A}}, [{"a": 1}], [{"a": 1, "z": 1}]),
        ({**NODE, "$defs": {"N": NODE}}, [{"next": {"next": {}}}], [{"next": {"next": {"z": 1}}}]),
        (
            {"allOf": [REF_A, {"properties": {"b": INTEGER}}], "$defs": {"A": A}},
            [{"a": 1, "b": 1}, {"a": 1}],
            [{"a": 1, "z": 1}, {"b": 1}],
        ),
        (
            {"properties": {"k": INTEGER}, "anyOf": [REF_A, {"properties": {"b": INTEGER}}], "$defs": {"A": A}},
            [{"k": 1, "a": 1}, {"k": 1, "b": 1}],
            [{"k": 1, "z": 1}],
        ),
        (
            {"properties": {"x": REF_A, "y": {"allOf": [REF_A]}}, "$defs": {"A": A}},
            [{"x": {"a": 1}, "y": {"a": 1}}],
            [{"x": {"a": 1, "z": 1}}, {"y": {"a": 1, "z": 1}}],
        ),
        ({"allOf": [A, {"additionalProperties": INTEGER}]}, [{"a": 1, "z": 1}], [{"z": 1}]),
    ],
)
def test_objects_are_closed_unless_the_schema_says_otherwise(
    schema: Any, allowed: list[Any], forbidden: list[Any]
) -> None:
    before = json.dumps(schema)
    result = closed(schema)
    assert json.dumps(schema) == before
    validator = jsonschema.Draft202012Validator(result)
    assert [value for value in allowed if not validator.is_valid(value)] == []
    assert [value for value in forbidden if validator.is_valid(value)] == []
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(result))
    assert not llguidance.LLMatcher.validate_grammar(grammar)


@pytest.mark.parametrize(
    "schema",
    [True, {"properties": 5, "allOf": 3}, {"$ref": 5, "anyOf": [5]}, {"$ref": "http://x", "properties": {}}]
    + [{"$ref": "#/x/0", "allOf": [{"$ref": "#"}], "$defs": 3, "x": []}, {"enum": [{"properties": {}}]}],
)
def test_what_is_no_schema_passes_through(schema: Any) -> None:
    closed(schema)
    assert closed({"enum": [{"properties": {}}]}) == {"enum": [{"properties": {}}]}

"""Random JSON schemas, and whether an answer has the form that one asks for."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Everything bounded, because small models have no wish to come to an end."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * 2 if depth else kinds)
    if kind == "string":
        return rng.choice(
            [{"type": "string", "maxLength": rng.randint(0, 6)}, {"type": "string", "pattern": "^[a-f]{1,4}$"}]
        )
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 2000)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", 'a "b"', 7, None, True, "line\nend"], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 4, {"k": [1]}])}
    if kind == "object":
        names = rng.sample(["name", "age", "ok", "zürich", "a b", "x"], rng.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.6],
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"type": kind}


def assert_valid(text: str, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))

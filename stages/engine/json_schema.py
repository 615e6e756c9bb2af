"""JSON schemas for answers: an object has no keys that its schema does not name, unless the schema says otherwise."""

from __future__ import annotations

import copy
from typing import Any
from urllib.parse import unquote

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("prefixItems", "items")
_BRANCHES = ("allOf", "anyOf", "oneOf")
_OPEN = ("additionalProperties", "unevaluatedProperties", "propertyNames", "if", "not", "dependentSchemas")
"""Where one of these is, the schema speaks for itself."""


def closed(schema: Any) -> Any:
    """A copy in which `additionalProperties` is false by default. Raises RecursionError for one too deep.

    Schemas that together describe one object (`allOf`, or anything beside `properties`) are closed around the keys of
    all of them: there each takes part through a copy that is itself not closed.
    """
    if not isinstance(schema, dict):
        return schema
    return _Closing(schema).run()


class _Closing:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._open_copies: dict[str, str] = {}
        """Names in $defs by reference."""
        self._definitions: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        result = self._object(self._root, is_part=False)
        if self._definitions:
            definitions = result.get("$defs")
            result["$defs"] = {**(definitions if isinstance(definitions, dict) else {}), **self._definitions}
        return result

    def _any(self, schema: Any) -> Any:
        return self._object(schema, is_part=False) if isinstance(schema, dict) else copy.deepcopy(schema)

    def _object(self, schema: dict[str, Any], *, is_part: bool) -> dict[str, Any]:
        """is_part: a schema around it is closed instead."""
        branches = [name for name in _BRANCHES if isinstance(schema.get(name), list)]
        has_properties = any(isinstance(schema.get(name), dict) for name in ("properties", "patternProperties"))
        is_alone = not branches and "$ref" not in schema
        # Alternatives with nothing beside them are closed one by one; all else with branches as a whole.
        is_whole = not is_alone and (is_part or has_properties or "allOf" in branches or len(branches) > 1)
        is_whole = is_whole or ("$ref" in schema and bool(branches))
        result = {name: self._keyword(name, value, is_whole) for name, value in schema.items()}
        if is_part or any(name in schema for name in _OPEN):
            return result
        if is_alone and has_properties:
            result["additionalProperties"] = False
        elif is_whole:
            names = self._names(schema, set())
            if names:
                own = result.get("properties")
                result["properties"] = {**dict.fromkeys(sorted(names), True), **(own if isinstance(own, dict) else {})}
                result["additionalProperties"] = False
        return result

    def _keyword(self, name: str, value: Any, is_whole: bool) -> Any:
        if name in _MAPS and isinstance(value, dict):
            return {key: self._any(one) for key, one in value.items()}
        if name in _BRANCHES and isinstance(value, list):
            return [self._object(one, is_part=is_whole) if isinstance(one, dict) else one for one in value]
        if name in _LISTS and isinstance(value, list):
            return [self._any(one) for one in value]
        if name in ("items", "additionalProperties", "additionalItems", "contains"):
            return self._any(value)
        if name == "$ref" and is_whole and isinstance(value, str):
            return self._open_copy(value)
        return copy.deepcopy(value)

    def _open_copy(self, reference: str) -> str:
        target = self._target(reference)
        if not isinstance(target, dict):
            return reference
        if reference not in self._open_copies:
            name = f"open-{len(self._open_copies)}"
            self._open_copies[reference] = f"#/$defs/{name}"
            self._definitions[name] = self._object(target, is_part=True)
        return self._open_copies[reference]

    def _names(self, schema: Any, seen: set[str]) -> set[str] | None:
        """The keys of the object that `schema` describes; None where it says more than that."""
        if not isinstance(schema, dict):
            return set()
        if any(name in schema for name in (*_OPEN, "patternProperties")):
            return None
        properties = schema.get("properties")
        names = set(properties) if isinstance(properties, dict) else set()
        parts = [part for name in _BRANCHES if isinstance(schema.get(name), list) for part in schema[name]]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            target = self._target(reference)
            if target is None:
                return None
            parts.append(target)
        for part in parts:
            more = self._names(part, seen)
            if more is None:
                return None
            names |= more
        return names

    def _target(self, reference: str) -> Any:
        """None for another document."""
        if not reference.startswith("#"):
            return None
        target: Any = self._root
        for key in filter(None, reference[1:].split("/")):
            key = unquote(key).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                return None
        return target

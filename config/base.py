"""Base of settings: frozen, strict, with errors that a user can act on."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import pydantic
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from stagemesh.config.errors import ConfigError

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a mapping",
    type(None): "null",
}
_PLURALS = {int: "integers", str: "strings"}
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


class Settings(pydantic.BaseModel):
    """Values from outside. One ConfigError lists all that is wrong. A field's docstring is its flag's help."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # YAML and JSON have types; "2" is not 2 and true is not 1
        use_attribute_docstrings=True,
        protected_namespaces=(),  # else pydantic warns of names that begin with `model_`
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise _config_error(type(self), values, error) from None

    @classmethod
    def parse(cls, values: Any) -> Self:
        """From a YAML or JSON mapping."""
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigError("", values, f"expected a mapping of names to values, got {values!r:.200}")
        return cls(**values)


def allowed(field: FieldInfo) -> str:
    """The values of a field in words, e.g. "an integer, at least 1, or null"."""
    options = _options(field.annotation)
    bounds = _bounds(field.metadata)
    if bounds and options[-1] == "null":
        return ", ".join([" or ".join(options[:-1]), " and ".join(bounds), "or null"])
    return ", ".join([" or ".join(options), *([" and ".join(bounds)] if bounds else [])])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message: the nearest known name, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _bounds(metadata: Iterable[Any]) -> list[str]:
    parts = [part for entry in metadata for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    return [
        f"{word} {getattr(bound, attribute):g}"
        for bound in parts
        for kind, attribute, word in _BOUNDS
        if isinstance(bound, kind)
    ]


def _options(annotation: Any) -> list[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *metadata = get_args(annotation)
        return [", ".join([" or ".join(_options(kind)), *_bounds(metadata)])]
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    if origin is Literal:
        return [f"one of {', '.join(map(str, get_args(annotation)))}"]
    if origin in (list, tuple):
        return [f"a list of {_PLURALS.get(get_args(annotation)[0], 'values')}"]
    return [_WORDS.get(origin or annotation, str(annotation))]


def _config_error(settings: type[Settings], values: dict[str, Any], error: pydantic.ValidationError) -> ConfigError:
    problems: dict[str, ConfigError] = {}
    for problem in error.errors(include_url=False):
        # A union reports each of its branches; one report per field is enough.
        name = str(problem["loc"][0]) if problem["loc"] else ""
        # The value of a field that is left out of its settings' repr is a secret.
        is_secret = name in settings.model_fields and not settings.model_fields[name].repr
        value = "…" if is_secret else values.get(name)
        problems.setdefault(name, ConfigError(name, value, _reason(settings, name, dict(problem))))
    if len(problems) == 1:
        return next(iter(problems.values()))
    return ConfigError("", None, "\n".join(map(str, problems.values())))


def _reason(settings: type[Settings], name: str, problem: dict[str, Any]) -> str:
    fields = settings.model_fields
    if problem["type"] == "extra_forbidden":
        return "unknown setting" + did_you_mean(name, fields)
    if problem["type"] == "value_error":  # from a validator of ours, which says what it wants
        return str(problem["ctx"]["error"])
    if name not in fields:
        return str(problem["msg"])
    missing = "is required and " if problem["type"] == "missing" else ""
    return f"{missing}must be {allowed(fields[name])}"

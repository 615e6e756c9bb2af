"""What all of OpenAI's requests share: lenient types, parsing, and errors that name the field.

null means the default. As in vLLM, a number may come as a string ("5") or as a whole float (5.0), and a field that is
unknown or has no effect here is accepted; the log names it once. With `strict_fields` it is refused.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Self

import pydantic
from pydantic_core import PydanticCustomError

from stagemesh.config.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
MAX_WARNED = 1000
"""Names of fields that were warned of are kept, and clients choose them."""

_STRUCTURED = "is no field any more; use structured_outputs"
# What would change the answer and cannot be done: refused except at a neutral value.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "guided_choice": ((), _STRUCTURED),
    "guided_grammar": ((), _STRUCTURED),
    "guided_json": ((), _STRUCTURED),
    "guided_regex": ((), _STRUCTURED),
    "prompt_embeds": (([],), "is not supported; send text or token ids"),
    "suffix": (("",), "is not supported"),
}
# Known and without effect, by their neutral values; None is neutral everywhere.
_INERT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "ec_transfer_params": (),
    "function_call": ("none",),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "repetition_detection": (),
    "return_token_offsets": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "verbosity": ("medium",),
    "vllm_xargs": (),
    "web_search_options": (),
}
# Nobody expects these to change an answer.
_IGNORED = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "session_id"}
_warned: set[str] = set()


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "input should be a valid number, not true or false")
    return value


def _not_text(value: Any) -> Any:
    if isinstance(value, str):
        raise PydanticCustomError("int_type", "must be an integer, not a text")
    return _not_bool(value)


Int = Annotated[int, pydantic.BeforeValidator(_not_bool)]
Count = Annotated[int, pydantic.BeforeValidator(_not_text)]
"""Of logprobs: the one kind of number that vLLM does not take as a text."""
Float = Annotated[float, pydantic.BeforeValidator(_not_bool)]


TEXTS_OR_TOKENS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "integer"}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
"""What `one_or_many` takes, as a JSON schema."""


def one_type(type: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of objects of this "type" that have all these properties, and any others."""
    fields = {"type": {"const": type}, **properties}
    return {"type": "object", "properties": fields, "required": list(fields)}


class OpenAIRequest(pydantic.BaseModel, extra="allow"):
    """None means not given."""

    model: str | None = None
    """One of the served names."""
    user: str | None = None
    """Without effect."""
    priority: Int | None = None
    """vLLM's: lower ones go first; default 0."""
    request_id: str | None = pydantic.Field(default=None, max_length=MAX_REQUEST_ID_CHARS)
    """vLLM's: the end of the answer's id. The header X-Request-Id wins."""
    timeout: Float | None = pydantic.Field(default=None, json_schema_extra={"exclusiveMinimum": 0})
    """Ours: seconds for the whole answer, its time in queues included; the server has a maximum."""

    @classmethod
    def parse(cls, body: bytes | dict[str, Any], *, strict_fields: bool = False) -> Self:
        """From JSON or fields. Raises ConfigError naming every wrong field."""
        try:
            request = cls.model_validate(body) if isinstance(body, dict) else cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise_all(_wrong_fields(error))
            raise
        raise_all(_unused(request, strict_fields))
        request._check()
        return request

    def _check(self) -> None:
        """What the types do not check. Raises ConfigError."""
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError("timeout", self.timeout, "must be above 0 seconds")


def raise_all(problems: Iterable[ConfigError]) -> None:
    """Raise one error for all, if there are any."""
    problems = list(problems)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("", None, "; ".join(map(str, problems)))


def one_or_many(field: str, value: Any) -> Sequence[str | list[int]]:
    """Several prompts as they are, one as a list of one. Raises ConfigError."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _all_of(int, value):
            return [value]
        if _all_of(str, value) or (_all_of(list, value) and all(_all_of(int, ids) for ids in value)):
            return value
    allowed = "a string, a list of strings, a list of token ids, or a list of lists of token ids, none empty"
    raise ConfigError(field, value, f"must be {allowed}")


def check_range(name: str, value: int | None, least: int, most: int) -> Iterator[ConfigError]:
    if value is not None and not least <= value <= most:
        yield ConfigError(name, value, f"must be within [{least}, {most}]")


def _all_of(kind: type, values: list[Any]) -> bool:
    # `type is` rather than isinstance: JSON's true is no token id.
    return all(type(value) is kind for value in values)


def _unused(request: pydantic.BaseModel, strict_fields: bool, prefix: str = "") -> Iterator[ConfigError]:
    """What is refused of the fields that no class declares; warns of the others, once for each name."""
    for name, value in (request.model_extra or {}).items():
        neutral, reason = _REFUSED.get(name, ((), ""))
        is_known = name in _REFUSED or name in _INERT
        is_neutral = value is None or any(_same(value, one) for one in (*neutral, *_INERT.get(name, ())))
        if name in _IGNORED or (is_neutral and (is_known or not strict_fields)):
            continue
        if reason:
            yield ConfigError(prefix + name, value, reason)
        elif not strict_fields:
            _warn_once(prefix + name)
        elif name in _INERT:
            yield ConfigError(prefix + name, value, "is not supported")
        else:
            near = difflib.get_close_matches(name, type(request).model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield ConfigError(prefix + name, value, f"is not a known request field{hint}")
    for name in type(request).model_fields:
        if isinstance(inner := getattr(request, name), pydantic.BaseModel):
            yield from _unused(inner, strict_fields, f"{prefix}{name}.")


def _warn_once(name: str) -> None:
    name = name[:100]
    if name not in _warned and len(_warned) < MAX_WARNED:
        _warned.add(name)
        logger.warning("the request field %r has no effect here", name)


def _same(value: Any, neutral: Any) -> bool:
    # 0 == False in Python, but logprobs=0 requests something and logprobs=false nothing.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _wrong_fields(error: pydantic.ValidationError) -> list[ConfigError]:
    """The first problem of each field of the body, such as "messages[0].content"."""
    by_field: dict[Any, Any] = {}
    for problem in error.errors(include_url=False, include_context=False):
        if problem["type"] == "json_invalid":
            reason = problem["msg"].removeprefix("Invalid JSON: ")
            return [ConfigError("", None, f"the body is not valid JSON: {reason}")]
        if not problem["loc"]:
            return [ConfigError("", None, "the body must be a JSON object")]
        # A union reports every branch; the deepest is the one that was meant.
        best = by_field.setdefault(problem["loc"][0], problem)
        if len(problem["loc"]) > len(best["loc"]):
            by_field[problem["loc"][0]] = problem
    return [_config_error(problem) for problem in by_field.values()]


def _config_error(problem: dict[str, Any]) -> ConfigError:
    field = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part.isidentifier() and part != "str":  # "str" and "list[str]" are branches, not fields
            field += f".{part}" if field else part
    if problem["type"] == "missing":
        return ConfigError(field, None, "is required")
    # The kind has pydantic's name, which vLLM's clients find in its messages.
    return ConfigError(field, problem["input"], f"{problem['msg'].lower()} ({problem['type']})")

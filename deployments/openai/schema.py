"""What all of OpenAI's requests share: parsing, and errors that name the field.

A field of OpenAI or vLLM that is not supported here is accepted at its neutral value only; an unknown field is refused,
as by OpenAI. null means the default.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Self

import pydantic

from stagemesh.config.errors import ConfigError

# Neutral values of fields that are known and not supported; None is neutral everywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Known, and without effect on the response.
_IGNORED = {"metadata", "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier", "session_id"}


class OpenAIRequest(pydantic.BaseModel, strict=True, extra="allow"):
    """None means not given."""

    model: str | None = None
    """One of the served names."""
    user: str | None = None
    """Without effect."""
    priority: int | None = None
    """vLLM's: lower ones go first; default 0."""
    timeout: float | None = None
    """Ours: seconds for the whole answer, its time in queues included; the server has a maximum."""

    @classmethod
    def parse(cls, body: bytes | dict[str, Any]) -> Self:
        """From JSON or fields. Raises ConfigError naming the first wrong field."""
        try:
            request = cls.model_validate(body) if isinstance(body, dict) else cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise _config_error(error) from None
        request._check()
        return request

    def _check(self) -> None:
        """What the types do not check. Raises ConfigError."""
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError("timeout", self.timeout, "must be above 0 seconds")
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL:
                if value is not None and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                    raise ConfigError(name, value, "is not supported")
            elif name not in _IGNORED:
                near = difflib.get_close_matches(name, type(self).model_fields, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(name, value, f"is not a known request field{hint}")


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


def _all_of(kind: type, values: list[Any]) -> bool:
    # `type is` rather than isinstance: JSON's true is no token id.
    return all(type(value) is kind for value in values)


def _same(value: Any, neutral: Any) -> bool:
    # 0 == False in Python, but logprobs=0 requests something and logprobs=false nothing.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _config_error(error: pydantic.ValidationError) -> ConfigError:
    """The first wrong field, as "messages[0].content"."""
    problems = error.errors(include_url=False, include_context=False)
    problem = problems[0]
    if problem["type"] == "json_invalid":
        reason = problem["msg"].removeprefix("Invalid JSON: ")
        return ConfigError("", None, f"the body is not valid JSON: {reason}")
    if not problem["loc"]:
        return ConfigError("", None, "the body must be a JSON object")
    # A union reports every branch; the deepest is the one that was meant.
    problem = max((p for p in problems if p["loc"][0] == problem["loc"][0]), key=lambda p: len(p["loc"]))
    field = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part.isidentifier() and part != "str":  # "str" and "list[str]" are branches, not fields
            field += f".{part}" if field else part
    if problem["type"] == "missing":
        return ConfigError(field, None, "is required")
    return ConfigError(field, problem["input"], problem["msg"].lower())

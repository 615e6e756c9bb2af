"""How models write calls of their own accord. A new format is a class here and a line in `FORMATS`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.tool_reader import (
    BLANKS,
    Call,
    CallParser,
    Reading,
    expect,
    expect_mark,
    json_arguments,
    json_call,
    name_until,
    nothing,
    visible,
)


class FreeCalls(CallParser):
    """A format that a model was taught."""

    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Marks that tokenizers hold special and would leave out of the text."""


# ---- Hermes, Qwen 2.5 and 3: <tool_call>{"name": …, "arguments": {…}}</tool_call>


def _hermes(call: Call) -> Reading:
    yield from json_call(call, is_open=False)
    yield from expect_mark("</tool_call>")


class Hermes(FreeCalls):
    openings = {"<tool_call>": _hermes}


# ---- Llama 3: {"name": …, "parameters": {…}}, several joined by `;`, perhaps behind <|python_tag|>


def _llama(call: Call) -> Reading:
    call.then = {"{": _llama}
    yield from json_call(call)


def _tagged_llama(call: Call) -> Reading:
    yield from expect("{")
    yield from _llama(call)


class Llama3Json(FreeCalls):
    openings = {"{": _llama, "<|python_tag|>": _tagged_llama}
    line_openings = frozenset("{")
    separators = BLANKS + ";,"


# ---- A list of calls: [{"name": …, "arguments" or "parameters": {…}}, …]


def _listed(call: Call) -> Reading:
    call.then = {"{": _listed, "]": nothing}
    yield from json_call(call)


def _opened_list(call: Call) -> Reading:
    yield from expect("{")
    yield from _listed(call)


class ListedCalls(CallParser):
    """The form of calls by `forced_calls_schema`."""

    openings = {"[": _opened_list}
    separators = BLANKS + ","


# ---- Mistral: [TOOL_CALLS] and a list, or since tokenizer v11 [TOOL_CALLS]name[ARGS]{…}, perhaps [CALL_ID]… between


def _mistral(call: Call) -> Reading:
    char = yield from visible()
    if char == "[":
        yield from _opened_list(call)
        return
    if char == "{":
        yield from json_call(call)
        return
    name, end = yield from name_until("[{")
    call.begin(char + name)
    if end == "[":
        mark = yield from expect_mark("ARGS]", "CALL_ID]")
        if mark == "CALL_ID]":
            yield from name_until("[")
            yield from expect_mark("ARGS]")
        end = yield from expect("{")
    yield from json_arguments(call, end)
    call.complete()


class Mistral(FreeCalls):
    openings = {"[TOOL_CALLS]": _mistral}
    separators = BLANKS + ","
    special_tokens = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")


# ---- DeepSeek V3: <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a fenced JSON object, <｜tool▁call▁end｜>,
# ---- and since V3.1 <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>;
# ---- all calls between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>

_CALLS, _CALLS_END, _CALL, _CALL_END, _SEPARATOR = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
_JSON_FENCE, _FENCE = "```json", "```"


def _deepseek(call: Call) -> Reading:
    call.then = {_CALLS_END: nothing}
    name, _ = yield from name_until("<")
    yield from expect_mark(_SEPARATOR[1:])
    char = yield from visible()
    is_fenced = char != "{"
    if is_fenced:
        name, _ = yield from name_until("\n")
        name = char + name
        yield from expect_mark(_JSON_FENCE)
        char = yield from expect("{")
    call.begin(name)
    yield from json_arguments(call, char)
    call.complete()
    if is_fenced:
        yield from expect_mark(_FENCE)
    yield from expect_mark(_CALL_END)


def _deepseek_first(call: Call) -> Reading:
    yield from expect_mark(_CALL)
    yield from _deepseek(call)


class DeepSeekV3(FreeCalls):
    openings = {_CALLS: _deepseek_first, _CALL: _deepseek}
    special_tokens = (_CALLS, _CALLS_END, _CALL, _CALL_END, _SEPARATOR)


# ---- Qwen3-Coder: <tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>

_END_OF_VALUE = "</parameter>"


def _function(call: Call) -> Reading:
    name, _ = yield from name_until(">")
    call.begin(name)
    call.add("{")
    properties = {} if call.offered is None else call.offered.properties(name)
    while (yield from expect_mark("<parameter=", "</function>")) != "</function>":
        key, _ = yield from name_until(">")
        separator = ", " if call.keys else ""
        call.add(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        call.keys.add(key)
        yield from _parameter(call, properties.get(key))
    call.add("}")
    call.complete()


def _tagged_function(call: Call) -> Reading:
    yield from expect_mark("<function=")
    yield from _function(call)
    yield from expect_mark("</tool_call>")


def _parameter(call: Call, schema: Any) -> Reading:
    """A text is streamed, any other value comes as a whole. A line break at either end is no part of it."""
    types = _types(schema)
    is_text = types <= {"string"}
    value: list[str] = []
    is_first, held = True, ""
    if is_text:
        call.add('"')
    while held not in (_END_OF_VALUE, "\n" + _END_OF_VALUE):
        held += yield
        while held and not (_END_OF_VALUE.startswith(held) or ("\n" + _END_OF_VALUE).startswith(held)):
            char, held = held[0], held[1:]
            if is_text and not (is_first and char == "\n"):
                call.add(json.dumps(char, ensure_ascii=False)[1:-1])
            elif not is_text:
                value.append(char)
            is_first = False
    call.add('"' if is_text else _json_of("".join(value).strip(BLANKS), types))


def _types(schema: Any) -> set[str]:
    """JSON schema's names of the types that a value may have; none where it does not say."""
    found: set[str] = set()
    for branch in (schema, *_list(schema, "anyOf"), *_list(schema, "oneOf")):
        type = branch.get("type") if isinstance(branch, Mapping) else None
        found |= {type} if isinstance(type, str) else {name for name in _list(branch, "type") if isinstance(name, str)}
    return found


def _list(schema: Any, key: str) -> list[Any]:
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, list) else []


def _json_of(text: str, types: set[str]) -> str:
    """JSON text of a value that a model wrote, of one of `types` where it can be read so, else a text."""
    names = {"true": "true", "false": "false", "none": "null", "null": "null"}
    try:
        value = json.loads(names.get(text.lower(), text), parse_constant=float)
        type = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", str: "string"}.get(
            value.__class__, "null"
        )
        if type in types or (type == "integer" and "number" in types):
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        pass  # no JSON: a text
    return json.dumps(text, ensure_ascii=False)


class Qwen3Coder(FreeCalls):
    openings = {"<tool_call>": _tagged_function, "<function=": _function}


FORMATS: dict[str, type[FreeCalls]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
    "qwen3_coder": Qwen3Coder,
    "deepseek_v3": DeepSeekV3,
}
"""By vLLM's names."""


def format_named(name: str) -> type[FreeCalls]:
    """Raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError("tool_call_parser", name, f"must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_of(chat_template: str) -> type[FreeCalls] | None:
    """The format that a model's chat template teaches it."""
    signs: dict[str, type[FreeCalls]] = {
        "<function=": Qwen3Coder,
        "<tool_call>": Hermes,
        _CALL: DeepSeekV3,
        "[TOOL_CALLS]": Mistral,
        "<|python_tag|>": Llama3Json,
        "ipython": Llama3Json,
    }
    return next((format for sign, format in signs.items() if sign in chat_template), None)

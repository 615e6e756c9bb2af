"""Tool calls in an answer, streamed as OpenAI's deltas.

Free calls come in two formats: Hermes, also Qwen's (`<tool_call>{"name": …, "arguments": {…}}</tool_call>`), and
Llama 3's JSON (`{"name": …, "parameters": {…}}`, several joined by `;`). Forced calls (`tool_choice` required, or
naming a function) follow a JSON schema, whatever the model's format.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

Format = Literal["hermes", "llama3"]

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)
MAX_DEPTH = 200
"""Of a call's arguments: Python's JSON parser recurses, and only some processes may do so for long."""


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
    """Parses one answer."""

    def feed(self, text: str) -> ParsedText:
        """What became certain with `text`."""

    def finish(self) -> ParsedText:
        """What was held back."""


def format_of(chat_template: str) -> Format | None:
    """The format that a model's chat template teaches it."""
    if _OPEN in chat_template:
        return "hermes"
    if _PYTHON_TAG in chat_template or "ipython" in chat_template:
        return "llama3"
    return None


def free_parser(format: Format, *, parallel: bool) -> ToolParser:
    """Without `parallel` only the first call counts."""
    max_calls = None if parallel else 1
    return HermesParser(max_calls) if format == "hermes" else ObjectsParser(max_calls, before=_PYTHON_TAG, between=";")


def forced_calls_schema(functions: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """Of a list of calls, for `ObjectsParser(before="[", between=",")`."""
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
        return ParsedText("", [ToolCallDelta(0, None if name is None else _new_id(), name, text)])

    def finish(self) -> ParsedText:
        return ParsedText("", [])


class _FreeCalls:
    """The calls of one answer, read one at a time; those after the first `max_calls` are dropped."""

    def __init__(self, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self._num_calls = 0
        """Calls given out, if only in part."""
        self._unread = ""
        self._call: _CallReader | None = None

    def _read(self, call: _CallReader) -> list[ToolCallDelta]:
        """Moves unread text to `call`; returns what became certain of it."""
        self._unread = self._unread[call.feed(self._unread) :]
        if call.name is None or (not call.is_announced and self._num_calls == self._max_calls):
            return []
        arguments = call.arguments[call.num_sent :]
        call.num_sent += len(arguments)
        if call.is_announced:
            return [ToolCallDelta(self._num_calls - 1, None, None, arguments)] if arguments else []
        call.is_announced = True
        self._num_calls += 1
        return [ToolCallDelta(self._num_calls - 1, _new_id(), call.name, arguments)]


class HermesParser(_FreeCalls):
    """Calls between tags; all else is text."""

    def feed(self, text: str) -> ParsedText:
        self._unread += text
        content = ""
        deltas: list[ToolCallDelta] = []
        while True:
            call = self._call
            if call is None:
                before, tag, after = self._unread.partition(_OPEN)
                if not tag:
                    certain = _certain_length(before)
                    content += self._shown(before[:certain])
                    self._unread = before[certain:]
                    break
                content += self._shown(before.rstrip())
                self._unread, self._call = after, _CallReader()
                continue
            if call.is_call is None:
                deltas += self._read(call)
            if call.is_call is None:
                break
            if call.is_call:
                _, tag, after = self._unread.partition(_CLOSE)
                if not tag:
                    break
                self._unread = after
            else:
                content += _OPEN + call.unannounced
            self._call = None
        return ParsedText(content, deltas)

    def finish(self) -> ParsedText:
        call = self._call
        if call is None:
            return ParsedText(self._shown(self._unread), [])
        is_text = not call.is_call and call.unannounced
        return ParsedText(_OPEN + call.unannounced if is_text else "", [])

    def _shown(self, text: str) -> str:
        """Blanks between calls are no content."""
        return text if self._num_calls == 0 or text.strip() else ""


class ObjectsParser(_FreeCalls):
    """An answer of calls only or of text only. Text after the last call is dropped."""

    def __init__(self, max_calls: int | None = None, *, before: str, between: str) -> None:
        """before: optional, before the first object. between: separates objects."""
        super().__init__(max_calls)
        self._before = before
        self._between = between
        self._has_ended = False

    def feed(self, text: str) -> ParsedText:
        self._unread += text
        content = ""
        deltas: list[ToolCallDelta] = []
        while self._unread:
            call = self._call
            if call is not None:
                deltas += self._read(call)
                if call.is_call is not None:
                    self._call = None
                if call.is_call is False:
                    content += call.unannounced
                    self._has_ended = True
            elif self._has_ended:
                content += self._unread if self._num_calls == 0 else ""
                self._unread = ""
            elif not self._find_call():
                break
        return ParsedText(content, deltas)

    def finish(self) -> ParsedText:
        if self._call is not None:
            return ParsedText(self._call.unannounced, [])
        return ParsedText(self._unread if self._num_calls == 0 else "", [])

    def _find_call(self) -> bool:
        """Begin the next call or set `_has_ended`; False while neither is certain."""
        separator = self._between if self._num_calls else self._before
        text = self._unread.lstrip()
        has_separator = text.startswith(separator)
        if has_separator:
            text = text.removeprefix(separator).lstrip()
        if not text or (not has_separator and separator.startswith(text)):
            return False
        if text[0] == "{" and (has_separator or self._num_calls == 0):
            self._unread, self._call = text, _CallReader()
        else:
            self._has_ended = True
        return True


class _CallReader:
    """Reads one {"name": …, "arguments" or "parameters": {…}} object, cut anywhere, keys in any order."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""
        """JSON text so far."""
        self.is_call: bool | None = None
        """None until that is certain."""
        self.is_announced = False
        self.num_sent = 0
        """Characters of `arguments` given out."""
        self._text = ""
        self._reading = self._read()
        next(self._reading)

    @property
    def unannounced(self) -> str:
        """The text read, unless given out as a call."""
        return "" if self.is_announced else self._text

    def feed(self, text: str) -> int:
        """The number of characters read: all, unless `is_call` becomes known."""
        num_read = len(text)
        for i, char in enumerate(text, start=1):
            try:
                self._reading.send(char)
            except (StopIteration, ValueError) as end:
                self.is_call = isinstance(end, StopIteration)
                num_read = i
                break
        self._text += text[:num_read]
        return num_read

    def _read(self) -> Generator[None, str, None]:
        """Is sent each character; ends with the object. ValueError: it is no call."""
        yield from _expect("{")
        char = yield from _expect('"}')
        while char != "}":
            key = ""
            while (char := (yield)) != '"':
                key += char
            if key not in _KEYS:
                raise ValueError(key)
            yield from _expect(":")
            char = yield from self._read_value(key)
            if char == ",":
                char = yield from _expect('"}')
        if self.name is None:
            raise ValueError("no name")
        self.arguments = self.arguments or "{}"

    def _read_value(self, key: str) -> Generator[None, str, str]:
        """Returns the comma or brace behind the value."""
        char = yield from _visible()
        ends_itself = char in '"{['  # a number or literal ends where something else begins
        is_streamed = key in _ARGUMENTS and char == "{"  # arguments written as a string are certain once it is whole
        value, depth, in_string, is_escaped = "", 0, False, False
        while ends_itself or char not in ",}":
            value += char
            if is_streamed:
                self.arguments += char
            if in_string:
                in_string = is_escaped or char != '"'
                is_escaped = char == "\\" and not is_escaped
            else:
                in_string = char == '"'
                depth += (char in "{[") - (char in "}]")
                if depth > MAX_DEPTH:
                    raise ValueError("nested too deeply")
            if ends_itself and depth == 0 and not in_string:
                break
            char = yield
        content = json.loads(value)
        if key == "name":
            self.name = content if isinstance(content, str) else None
        elif key in _ARGUMENTS and isinstance(content, str):
            self.arguments = content
        return (yield from _expect(",}")) if ends_itself else char


def _visible() -> Generator[None, str, str]:
    """The next character that is not blank."""
    while (char := (yield)).isspace():
        pass
    return char


def _expect(chars: str) -> Generator[None, str, str]:
    """As _visible; ValueError unless it is one of `chars`."""
    char = yield from _visible()
    if char not in chars:
        raise ValueError(char)
    return char


def _certain_length(text: str) -> int:
    """Length without a partial tag at the end and blanks before it."""
    partial = next((length for length in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:length])), 0)
    return len(text[: len(text) - partial].rstrip())


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"

"""Tool calls in an answer: found while the text comes, and handed out in the shape of OpenAI's deltas.

Two formats of free answers are read: Hermes, which Qwen uses too (`<tool_call>{"name": …, "arguments": {…}}
</tool_call>`), and Llama 3's JSON (an answer that is `{"name": …, "parameters": {…}}`, several joined by `;`). A call
that is forced (`tool_choice` required, or naming a function) is generated under a JSON schema instead, whatever the
model's own format.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

Format = Literal["hermes", "llama3"]

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function that takes nothing."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A call that begins (with id and name), or more of its arguments."""

    index: int
    """Which call of the answer."""
    id: str | None
    name: str | None
    arguments: str
    """Next part of the arguments' JSON text."""


class ToolCall(msgspec.Struct, frozen=True):
    """One call of an answer."""

    id: str
    name: str
    arguments: str
    """JSON text, as far as it has come."""


class ParsedText(NamedTuple):
    content: str
    """Text that is not part of a call."""
    calls: list[ToolCallDelta]


class ToolParser(Protocol):
    """Parses one answer."""

    def feed(self, text: str) -> ParsedText:
        """What became certain with more text."""

    def finish(self) -> ParsedText:
        """The rest; there is no more text."""


def format_of(chat_template: str) -> Format | None:
    """In which format a model calls tools, judged by what its chat template shows it."""
    if _OPEN in chat_template:
        return "hermes"
    if _PYTHON_TAG in chat_template or "ipython" in chat_template:
        return "llama3"
    return None


def free_parser(format: Format, *, parallel: bool) -> ToolParser:
    """For an answer that may hold calls. parallel: whether more than the first one counts."""
    max_calls = None if parallel else 1
    return HermesParser(max_calls) if format == "hermes" else ObjectsParser(max_calls, before=_PYTHON_TAG, between=";")


def forced_calls_schema(functions: Sequence[dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """Of an answer that is a list of calls and nothing else, for `ObjectsParser(before="[", between=",")`."""
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


class HermesParser:
    """Calls between tags, text around them. What stands in tags and is no call stays text."""

    def __init__(self, max_calls: int | None = None) -> None:
        self._calls = _Calls(max_calls)
        self._held = ""
        """Text not judged yet: perhaps the beginning of a tag; blanks, which are dropped before a tag."""
        self._in_call = False

    def feed(self, text: str) -> ParsedText:
        self._held += text
        content = ""
        deltas: list[ToolCallDelta] = []
        while True:
            if not self._in_call:
                start = self._held.find(_OPEN)
                if start < 0:
                    sure = _without_possible_tag(self._held, _OPEN)
                    content += self._text(self._held[:sure])
                    self._held = self._held[sure:]
                    break
                content += self._text(self._held[:start].rstrip())
                self._held = self._held[start + len(_OPEN) :]
                self._in_call = True
                self._calls.begin()
            if not self._calls.is_over:
                used, new = self._calls.feed(self._held)
                self._held = self._held[used:]
                deltas += new
            if self._calls.has_failed:
                content += _OPEN + self._calls.give_up()
                self._in_call = False
                continue
            if not self._calls.is_over:
                break
            end = self._held.find(_CLOSE)
            if end < 0:
                break
            self._held = self._held[end + len(_CLOSE) :]
            self._in_call = False
        return ParsedText(content, deltas)

    def finish(self) -> ParsedText:
        if self._in_call:
            cut_off = "" if self._calls.is_over else self._calls.give_up()
            return ParsedText(_OPEN + cut_off if cut_off else "", [])
        held, self._held = self._held, ""
        return ParsedText(self._text(held), [])

    def _text(self, text: str) -> str:
        return text if self._calls.num_begun == 0 or text.strip() else ""


class ObjectsParser:
    """The answer is calls, one object after the other, or else it is text. Text after the last call is dropped."""

    def __init__(self, max_calls: int | None = None, *, before: str, between: str) -> None:
        """before: may stand before the first object. between: what separates the objects."""
        self._calls = _Calls(max_calls)
        self._before = before
        self._between = between
        self._held = ""
        self._state: Literal["start", "call", "between", "text", "end"] = "start"

    def feed(self, text: str) -> ParsedText:
        self._held += text
        content = ""
        deltas: list[ToolCallDelta] = []
        while self._held:
            if self._state == "start":
                rest = self._held.lstrip()
                if rest.startswith(self._before):
                    rest = rest.removeprefix(self._before).lstrip()
                elif self._before.startswith(rest):
                    break
                if not rest:
                    break
                is_call = rest.startswith("{")
                self._begin("call" if is_call else "text")
                if is_call:
                    self._held = rest
            elif self._state == "call":
                used, new = self._calls.feed(self._held)
                self._held = self._held[used:]
                deltas += new
                if self._calls.has_failed:
                    content += self._calls.give_up()
                    self._state = "text" if self._calls.num_begun == 0 else "end"
                elif self._calls.is_over:
                    self._state = "between"
            elif self._state == "between":
                rest = self._held.lstrip()
                if rest.startswith(self._between):
                    rest = rest.removeprefix(self._between).lstrip()
                    if rest:
                        self._begin("call" if rest.startswith("{") else "end")
                elif rest:
                    self._state = "end"
                if not rest:
                    break
                self._held = rest
            else:
                content += self._held if self._state == "text" else ""
                self._held = ""
        return ParsedText(content, deltas)

    def finish(self) -> ParsedText:
        held, self._held = self._held, ""
        if self._state == "call":
            return ParsedText(self._calls.give_up(), [])
        return ParsedText(held if self._state == "start" else "", [])

    def _begin(self, state: Literal["call", "text", "end"]) -> None:
        self._state = state
        if state == "call":
            self._calls.begin()


class _Calls:
    """The calls of one answer, one at a time: `begin`, then `feed` until `is_over` or `has_failed`."""

    def __init__(self, max_calls: int | None) -> None:
        self.num_begun = 0
        """Calls that were handed out, if only in part."""
        self._max_calls = max_calls
        self._reader = _CallReader()
        self._raw = ""
        self._is_announced = False
        self._num_sent = 0

    @property
    def is_over(self) -> bool:
        return self._reader.state == "done"

    @property
    def has_failed(self) -> bool:
        return self._reader.state == "failed"

    def begin(self) -> None:
        self._reader = _CallReader()
        self._raw = ""
        self._is_announced = False
        self._num_sent = 0

    def feed(self, text: str) -> tuple[int, list[ToolCallDelta]]:
        """How much of `text` belongs to the call, and what became certain of it."""
        used = self._reader.feed(text)
        self._raw += text[:used]
        reader = self._reader
        if reader.name is None or (self.num_begun == self._max_calls and not self._is_announced):
            return used, []
        arguments = reader.arguments[self._num_sent :]
        if self.is_over and not reader.arguments:
            arguments = "{}"
        if not self._is_announced:
            self._is_announced = True
            self.num_begun += 1
            delta = ToolCallDelta(self.num_begun - 1, _new_id(), reader.name, arguments)
        elif arguments:
            delta = ToolCallDelta(self.num_begun - 1, None, None, arguments)
        else:
            return used, []
        self._num_sent += len(arguments)
        return used, [delta]

    def give_up(self) -> str:
        """Its text, unless part of it was handed out as a call already."""
        return "" if self._is_announced else self._raw


class _CallReader:
    """Reads one {"name": …, "arguments" or "parameters": {…}} object, in pieces of any size, in any order of keys."""

    KEYS = ("name", "arguments", "parameters", "type", "id")

    def __init__(self) -> None:
        self.state: Literal["start", "key", "in key", "colon", "value", "after", "done", "failed"] = "start"
        self.name: str | None = None
        self.arguments = ""
        """JSON text, as far as it has come."""
        self._key = ""
        self._value = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` were read: all, unless the object ends or turns out not to be a call."""
        for i, char in enumerate(text):
            if self.state == "failed":
                return i
            self._take(char)
            if self.state == "done":
                return i + 1
        return len(text)

    def _take(self, char: str) -> None:
        if self.state == "value":
            self._take_value(char)
        elif self.state == "in key":
            if char == '"':
                self.state = "colon" if self._key in self.KEYS else "failed"
            else:
                self._key += char
        elif char.isspace():
            pass
        elif self.state == "start":
            self.state = "key" if char == "{" else "failed"
        elif self.state == "key" and char == '"':
            self.state, self._key = "in key", ""
        elif self.state == "colon" and char == ":":
            self.state, self._value, self._depth = "value", "", 0
        elif self.state == "after" and char == ",":
            self.state = "key"
        elif self.state in ("after", "key") and char == "}":
            self.state = "failed" if self.name is None else "done"
        else:
            self.state = "failed"

    def _take_value(self, char: str) -> None:
        if not self._value and char.isspace():
            return
        if self._in_string:
            self._add(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self._end_value_if_whole()
        elif self._depth == 0 and self._value and char in ",}":
            self._end_value()
            self._take(char)
        else:
            self._add(char)
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if not self._in_string:
                self._end_value_if_whole()

    def _add(self, char: str) -> None:
        self._value += char
        # Arguments written as a string hold their JSON text, which is certain only once it is whole.
        if self._key in ("arguments", "parameters") and self._value[0] == "{":
            self.arguments += char

    def _end_value_if_whole(self) -> None:
        if self._depth == 0 and self._value[-1] in '"}]':
            self._end_value()

    def _end_value(self) -> None:
        self.state = "after"
        try:
            value = json.loads(self._value)
        except ValueError:
            self.state = "failed"
            return
        if self._key == "name":
            self.name = value if isinstance(value, str) else None
        elif self._key in ("arguments", "parameters") and isinstance(value, str):
            self.arguments = value


def _without_possible_tag(text: str, tag: str) -> int:
    """Where the end of `text` begins that may be blanks before a tag and the beginning of the tag itself."""
    end = len(text)
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            end = len(text) - length
            break
    return len(text[:end].rstrip())


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"

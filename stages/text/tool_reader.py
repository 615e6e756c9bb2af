"""Finds calls in a text that comes in pieces: an opening mark, and behind it what a format's reader understands.

A reader is a generator that is sent one character after the other: it ends behind the call, and raises ValueError
where the text is no call. So nothing depends on where the text was cut. A call is certain, and streamed from then on,
as soon as its name, the beginning of its arguments and all their required keys were read; what fails before is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from stagemesh.stages.text.tool_calls import OfferedTools, ParsedText, ToolCallDelta, new_call_id

MAX_DEPTH = 200
"""Of a call's arguments: Python's JSON parser recurses, and only some processes may do so for long."""
MAX_NAME_CHARS = 256
BLANKS = " \t\r\n"

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)

Reading = Generator[None, str, None]
Read = Callable[["Call"], Reading]
Openings = Mapping[str, Read]
"""By opening mark."""


class Call:
    """A call that is being read; a mark that belongs to calls and is none stays without name."""

    def __init__(self, read: Read, offered: OfferedTools | None) -> None:
        """offered: None where a grammar already allows no other calls."""
        self.name: str | None = None
        self.keys: set[str] = set()
        """Of the arguments so far."""
        self.then: Openings = {}
        """The further marks that may follow it."""
        self.index: int | None = None
        """Among the calls given out; None before that."""
        self.has_failed = False
        self.offered = offered
        self._has_arguments = False
        self._required: set[str] = set()
        self._unsent: list[str] = []
        self._read_text: list[str] = []
        self._num_read = 0
        self._num_used = 0
        self._reading = read(self)
        self.is_over = next(self._reading, self) is self

    @property
    def is_certain(self) -> bool:
        return self.name is not None and self._has_arguments and self._required <= self.keys

    @property
    def text(self) -> str:
        """All that was read."""
        return "".join(self._read_text)

    @property
    def unused_text(self) -> str:
        """Read behind the last part of the call."""
        return self.text[self._num_used :]

    def feed(self, text: str) -> int:
        """The number of characters read: all, unless the call is over."""
        if self.is_over:
            return 0
        num_before = self._num_read
        try:
            for char in text:
                self._num_read += 1
                self._reading.send(char)
        except (StopIteration, ValueError) as end:
            self.is_over, self.has_failed = True, isinstance(end, ValueError)
        num_read = self._num_read - num_before
        self._read_text.append(text[:num_read])
        return num_read

    def begin(self, name: str) -> None:
        if self.name is not None or (self.offered is not None and name not in self.offered):
            raise ValueError(name)
        self.name = name
        self._required = set() if self.offered is None else self.offered.required(name)
        self._num_used = self._num_read

    def add(self, arguments: str) -> None:
        """The next part of their JSON text."""
        self._has_arguments = True
        self._unsent.append(arguments)
        self._num_used = self._num_read

    def complete(self) -> None:
        """ValueError: something is missing."""
        if self.name is None:
            raise ValueError("no name")
        if not self._has_arguments:
            if self.offered is not None and self.offered.properties(self.name):
                raise ValueError("no arguments")
            self.add("{}")
        if not self.is_certain:
            raise ValueError("arguments are missing")
        self._num_used = self._num_read

    def take(self) -> str:
        """Arguments not given out yet."""
        text = "".join(self._unsent)
        self._unsent.clear()
        return text


class CallParser:
    """Base of the formats; see tool_formats.py."""

    openings: ClassVar[Openings]
    line_openings: ClassVar[frozenset[str]] = frozenset()
    """Those that count at the start of a line only."""
    separators: ClassVar[str] = BLANKS
    """Characters that are no content behind a call and before the next."""

    def __init__(self, offered: OfferedTools | None, *, max_calls: int | None = None) -> None:
        """Calls after the first `max_calls` are dropped."""
        self._offered = offered
        self._max_calls = max_calls
        self._num_calls = 0
        self._unread = ""
        self._call: Call | None = None
        self._lead = ""
        """The mark that opened it, and blanks before."""
        self._is_after_call = False
        self._then: Openings = {}
        self._is_line_start = True
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def feed(self, text: str) -> ParsedText:
        self._unread += text
        while self._find_call() if self._call is None else self._read_call(self._call):
            pass
        found = ParsedText("".join(self._content), self._deltas)
        self._content, self._deltas = [], []
        return found

    def finish(self) -> ParsedText:
        call = self._call
        if call is not None:
            return ParsedText("" if call.is_certain else self._lead + call.text, [])
        return ParsedText("" if self._is_between(self._unread) else self._unread, [])

    def _find_call(self) -> bool:
        """Begin the next call, or show what is certainly text."""
        text = self._unread
        marks = (*self.openings, *self._then)
        for match in _pattern(marks).finditer(text):
            before = text[: match.start()]
            read = self._reader(match[0], before)
            if read is not None:
                shown = self._without_blanks(before)
                self._lead = text[len(shown) : match.end()]
                self._unread = text[match.end() :]
                self._call = Call(read, self._offered)
                self._show(shown)
                return True
        certain = self._without_blanks(text[: _first_partial(text, marks)])
        self._unread = text[len(certain) :]
        self._show(certain)
        return False

    def _reader(self, mark: str, before: str) -> Read | None:
        if mark in self._then and self._is_between(before):
            return self._then[mark]
        if mark in self.line_openings:
            _, newline, line = before.rpartition("\n")
            if line.strip(BLANKS) or not (newline or self._is_line_start):
                return None
        return self.openings.get(mark)

    def _read_call(self, call: Call) -> bool:
        """Go on with it; False while it is not over."""
        self._unread = self._unread[call.feed(self._unread) :]
        if call.is_certain:
            self._give_out(call)
        if not call.is_over:
            return False
        self._call = None
        if call.has_failed and not call.is_certain:
            text = call.text
            # Another call may begin in what this one has read. Only the last mark is tried, else a text of many marks
            # would be read once for each.
            start = max(text.rfind(mark) for mark in self.openings)
            start = _first_partial(text, tuple(self.openings)) if start < 0 else start
            self._show(self._lead + text[:start])
            self._unread = text[start:] + self._unread
            return True
        self._is_after_call, self._then = True, call.then
        if call.has_failed:
            self._unread = call.unused_text + self._unread
        return True

    def _give_out(self, call: Call) -> None:
        if call.index is not None:
            if arguments := call.take():
                self._deltas.append(ToolCallDelta(call.index, None, None, arguments))
        elif self._num_calls != self._max_calls:
            call.index = self._num_calls
            self._num_calls += 1
            self._deltas.append(ToolCallDelta(call.index, new_call_id(), call.name, call.take()))

    def _is_between(self, text: str) -> bool:
        return self._is_after_call and not text.strip(self.separators)

    def _without_blanks(self, text: str) -> str:
        """Blanks before a call are no content."""
        return "" if self._is_between(text) else text.rstrip(BLANKS)

    def _show(self, text: str) -> None:
        if not text:
            return
        self._content.append(text)
        self._is_after_call, self._then = False, {}
        _, newline, line = text.rpartition("\n")
        self._is_line_start = not line.strip(BLANKS) and bool(newline or self._is_line_start)


@lru_cache
def _pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)))


def _first_partial(text: str, marks: tuple[str, ...]) -> int:
    """Start of the longest suffix that is the beginning of a mark, or len(text)."""
    longest = max(map(len, marks))
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)


# ---- what readers are made of


def nothing(call: Call) -> Reading:
    """Of a mark that belongs to calls and has no content."""
    yield from ()


def visible() -> Generator[None, str, str]:
    """The next character that is not blank."""
    while (char := (yield)) in BLANKS:
        pass
    return char


def expect(chars: str) -> Generator[None, str, str]:
    """As visible; ValueError unless it is one of `chars`."""
    char = yield from visible()
    if char not in chars:
        raise ValueError(char)
    return char


def expect_mark(*marks: str) -> Generator[None, str, str]:
    """The mark that comes next, blanks aside; none of them is the beginning of another."""
    text = yield from visible()
    while text not in marks:
        if not any(mark.startswith(text) for mark in marks):
            raise ValueError(text)
        text += yield
    return text


def name_until(ends: str) -> Generator[None, str, tuple[str, str]]:
    """A name, blanks around it aside, and the one of `ends` behind it."""
    name = ""
    while (char := (yield)) not in ends:
        name += char
        if len(name) > MAX_NAME_CHARS:
            raise ValueError(name)
    return name.strip(BLANKS), char


def json_call(call: Call, *, is_open: bool = True) -> Reading:
    """{"name": …, "arguments" or "parameters": {…}}, keys in any order. is_open: behind its first brace."""
    if not is_open:
        yield from expect("{")
    char = yield from expect('"}')
    while char != "}":
        key = ""
        while (char := (yield)) != '"':
            key += char
            if not any(name.startswith(key) for name in _KEYS):
                raise ValueError(key)
        if key not in _KEYS:
            raise ValueError(key)
        yield from expect(":")
        char = yield from _member(call, key)
        if char == ",":
            char = yield from expect('"')
    call.complete()


def json_arguments(call: Call, first: str) -> Reading:
    """An object whose first character was read."""
    scan, value, char = _ObjectScan(call.keys), [first], first
    call.add(char)
    while not scan.ends_with(char):
        char = yield
        value.append(char)
        call.add(char)
    json.loads("".join(value))


def _member(call: Call, key: str) -> Generator[None, str, str]:
    """Returns the comma or brace behind the value."""
    char = yield from visible()
    if key in _ARGUMENTS and char == "{":
        yield from json_arguments(call, char)
        return (yield from expect(",}"))
    value, scan = [], _ObjectScan(set())
    ends_itself = char in '"{['  # a number or literal ends where something else begins
    while ends_itself or char not in ",}":
        value.append(char)
        if scan.ends_with(char) and ends_itself:
            break
        char = yield
    content = json.loads("".join(value))
    if key == "name":
        if not isinstance(content, str):
            raise ValueError("no name")
        call.begin(content)
    elif key in _ARGUMENTS and isinstance(content, str):  # written as a text, they are certain once it is whole
        call.keys.update(_object_of(content))
        call.add(content)
    elif key in _ARGUMENTS and content is not None:
        raise ValueError("arguments are no object")
    return (yield from expect(",}")) if ends_itself else char


class _ObjectScan:
    """Finds the end of a JSON value, and the keys of an outermost object on the way."""

    def __init__(self, keys: set[str]) -> None:
        self._keys = keys
        self._depth = 0
        self._in_string = self._is_escaped = self._expects_key = False
        self._key: list[str] = []

    def ends_with(self, char: str) -> bool:
        if self._in_string:
            if self._expects_key:
                self._key.append(char)
            self._in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
        elif char == '"':
            self._in_string, self._key = True, ['"']
        elif char in "{[":
            self._depth += 1
            self._expects_key = self._depth == 1
            if self._depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
        elif char in "}]":
            self._depth -= 1
            self._expects_key = False
        elif self._depth == 1 and char in ",:":
            if char == ":" and self._expects_key:
                self._keys.add(json.loads("".join(self._key)))
            self._expects_key = char == ","
        return self._depth == 0 and not self._in_string


def _object_of(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value

"""Tool calls are found in an answer however its text was cut into pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from stagemesh.stages.text.tool_calls import (
    MAX_DEPTH,
    HermesParser,
    NamedParser,
    ObjectsParser,
    ToolParser,
    forced_calls_schema,
    format_of,
    free_parser,
)

WEATHER = '{"name": "get_weather", "arguments": {"city": "Köln \\"am\\" {Rhein}", "days": [1, 2], "unit": null}}'
ARGUMENTS = '{"city": "Köln \\"am\\" {Rhein}", "days": [1, 2], "unit": null}'
LLAMA_WEATHER = WEATHER.replace('"arguments"', '"parameters"')


def parse(make: Callable[[], ToolParser], text: str, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    parser = make()
    found = [parser.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found.append(parser.finish())
    calls: list[list[str]] = []
    ids = set()
    for delta in (delta for part in found for delta in part.calls):
        if delta.index == len(calls):
            assert delta.name is not None and delta.id is not None
            ids.add(delta.id)
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.index == len(calls) - 1 and delta.name is None and delta.id is None
            calls[-1][1] += delta.arguments
    assert len(ids) == len(calls)
    return "".join(part.content for part in found), [(name, arguments) for name, arguments in calls]


def check(make: Callable[[], ToolParser], text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """In one piece, character by character, and cut at random."""
    rng = random.Random(len(text))
    ways = [[], list(range(1, len(text)))]
    ways += [sorted(rng.sample(range(1, len(text)), min(5, len(text) - 1))) for _ in range(20)]
    for cuts in ways:
        assert parse(make, text, cuts) == (content, calls), cuts


CALL = ("get_weather", ARGUMENTS)


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("Just text, 1 < 2.", "Just text, 1 < 2.", []),
        (f"<tool_call>\n{WEATHER}\n</tool_call>", "", [CALL]),
        (f"Let me see.\n\n<tool_call>\n{WEATHER}\n</tool_call>\n", "Let me see.", [CALL]),
        (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>", "", [CALL, CALL]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ('<tool_call>{"city": 3}', '<tool_call>{"city": 3}', []),
        ("half a tag <tool_c", "half a tag <tool_c", []),
        ("blanks at the end \n", "blanks at the end \n", []),
    ],
)
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(HermesParser, text, content, calls)


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("Just text; and more.", "Just text; and more.", []),
        (LLAMA_WEATHER, "", [CALL]),
        (f" \n{LLAMA_WEATHER}", "", [CALL]),
        (f"<|python_tag|>{LLAMA_WEATHER}; {LLAMA_WEATHER}", "", [CALL, CALL]),
        (f'{{"type": "function", {LLAMA_WEATHER[1:]}', "", [CALL]),
        ('{"title": "a JSON answer", "n": 1}', '{"title": "a JSON answer", "n": 1}', []),
        ("{}", "{}", []),
        ("<|python", "<|python", []),
    ],
)
def test_llama3(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(lambda: free_parser("llama3", parallel=True), text, content, calls)


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_forced_calls(count: int) -> None:
    text = "[" + ", ".join([LLAMA_WEATHER] * count) + "]"
    check(lambda: ObjectsParser(before="[", between=","), text, "", [CALL] * count)


def test_a_named_function_takes_the_whole_answer_as_its_arguments() -> None:
    check(lambda: NamedParser("get_weather"), ARGUMENTS, "", [CALL])


def test_only_the_first_call_counts_where_calls_may_not_be_parallel() -> None:
    hermes = f"<tool_call>{WEATHER}</tool_call><tool_call>{WEATHER}</tool_call>"
    assert parse(lambda: free_parser("hermes", parallel=False), hermes, [])[1] == [CALL]
    llama = f"{LLAMA_WEATHER}; {LLAMA_WEATHER}"
    assert parse(lambda: free_parser("llama3", parallel=False), llama, [])[1] == [CALL]


def test_arguments_are_streamed_as_they_come() -> None:
    parser = HermesParser()
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": ')
    (delta,) = parser.feed('"long te').calls
    assert delta.arguments == '"long te'


def test_a_call_cut_off_by_max_tokens_keeps_what_came() -> None:
    assert parse(HermesParser, '<tool_call>{"name": "f", "arguments": {"a": [1', [20]) == ("", [("f", '{"a": [1')])
    assert parse(HermesParser, '<tool_call>{"na', [])[0] == '<tool_call>{"na'


def test_the_schema_of_forced_calls_allows_exactly_the_functions() -> None:
    functions: list[dict[str, Any]] = [
        {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"p": {"$ref": "#/$defs/P"}},
                "$defs": {"P": {"type": "integer"}},
            },
        },
        {"name": "g"},
    ]
    validator = jsonschema.Draft202012Validator(forced_calls_schema(functions, parallel=True))
    validator.validate([{"name": "f", "parameters": {"p": 3}}, {"name": "g", "parameters": {}}])
    for wrong in ([], [{"name": "h", "parameters": {}}], [{"name": "f", "parameters": {"p": "x"}}], [{"name": "f"}]):
        assert not validator.is_valid(wrong), json.dumps(wrong)
    one = jsonschema.Draft202012Validator(forced_calls_schema(functions, parallel=False))
    assert not one.is_valid([{"name": "g", "parameters": {}}] * 2)


def test_the_format_is_read_off_the_chat_template() -> None:
    assert format_of("… within <tool_call></tool_call> XML tags …") == "hermes"
    assert format_of("{{ '<|python_tag|>' }}") == "llama3"
    assert format_of("{{ messages }}") is None


@pytest.mark.parametrize("depth, is_call", [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (100_000, False)])
def test_a_value_nested_past_all_reason_is_no_call(depth: int, is_call: bool) -> None:
    text = '{"parameters": ' + "[" * depth + "]" * depth + ', "name": "f"}'
    expected = ("", [("f", "{}")]) if is_call else (text, [])
    assert parse(lambda: free_parser("llama3", parallel=True), text, []) == expected

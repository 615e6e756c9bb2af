"""Tool calls are found in an answer however its text was cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.tool_calls import NamedParser, OfferedTools, ToolParser, forced_calls_schema
from stagemesh.stages.text.tool_formats import FORMATS, ListedCalls, format_named, format_of
from stagemesh.stages.text.tool_reader import MAX_DEPTH

OFFERED = OfferedTools(
    [
        {
            "name": "get_weather",
            "parameters": {
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "array"},
                    "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "exact": {"type": "boolean"},
                    "height": {"type": "number"},
                },
                "required": ["city"],
            },
        },
        {"name": "now"},
        {"name": "odd", "parameters": {"properties": {"a": 5, "b": {"anyOf": 3}}, "required": "a"}},
    ]
)
ARGUMENTS = '{"city": "Köln \\"am\\" {Rhein}", "days": [1, 2], "unit": null}'
WEATHER = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
LLAMA = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
XML = (
    '<function=get_weather>\n<parameter=city>\nKöln "am" {Rhein}\n</parameter>\n'
    "<parameter=days>\n[1, 2]\n</parameter>\n"
    "<parameter=unit>null</parameter>\n</function>"
)
BEGIN, END, ONE, ONE_END, SEP = (
    f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
)
DEEPSEEK = f"{ONE}function{SEP}get_weather\n```json\n{ARGUMENTS}\n```{ONE_END}"
DEEPSEEK_31 = f"{ONE}get_weather{SEP}{ARGUMENTS}{ONE_END}"
CALL = ("get_weather", ARGUMENTS)
Found = tuple[str, list[tuple[str, str]]]

CASES: dict[str, list[tuple[str, str, list[tuple[str, str]]]]] = {
    "hermes": [
        ("Just text, 1 < 2.", "Just text, 1 < 2.", []),
        (f"<tool_call>\n{WEATHER}\n</tool_call>", "", [CALL]),
        (f"Let me see.\n\n<tool_call>\n{WEATHER}\n</tool_call>\n", "Let me see.", [CALL]),
        (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>", "", [CALL, CALL]),
        (f"A <tool_call>{WEATHER}</tool_call> B ", "A B ", [CALL]),
        (f"<tool_call><tool_call>{WEATHER}</tool_call>", "<tool_call>", [CALL]),
        (f"<tool_call>{WEATHER}\n<tool_call>{WEATHER}</tool_call>", "", [CALL, CALL]),
        (f"<tool_call>{WEATHER[:-1]}, 3", ", 3", [CALL]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        (
            '<tool_call>{"arguments": {"city": "a"}, "name": "get_weather"}</tool_call>',
            "",
            [("get_weather", '{"city": "a"}')],
        ),
        (
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"a\\"}"}</tool_call>',
            "",
            [("get_weather", '{"city": "a"}')],
        ),
        ('<tool_call>{"name": "odd", "arguments": {"b": 1}}</tool_call>', "", [("odd", '{"b": 1}')]),
        *(
            (text, text, [])
            for text in (
                "<tool_call>not json</tool_call>",
                'See  <tool_call>{"city": 3}',
                "half a tag <tool_c",
                "blanks at the end \n",
                '<tool_call>{"name": "send_mail", "arguments": {"city": "a"}}</tool_call>',
                '<tool_call>{"name": "get_weather"}</tool_call>',
                '<tool_call>{"name": "get_weather", "arguments": {"town": {"city": 1}, "unit": "city"}}</tool_call>',
                '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
                '<tool_call>{"name": "odd", "arguments": "no object"}</tool_call>',
                '<tool_call>{"na',
            )
        ),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": [1', "", [("get_weather", '{"city": [1')]),
    ],
    "llama3_json": [
        ("Just text; and {more}.\n{} ", "Just text; and {more}.\n{} ", []),
        (LLAMA, "", [CALL]),
        (f" \n{LLAMA}", "", [CALL]),
        (f"<|python_tag|>{LLAMA}; {LLAMA}", "", [CALL, CALL]),
        (f"I look:\n{LLAMA}\nDone", "I look:\nDone", [CALL]),
        (f"inline {LLAMA}", f"inline {LLAMA}", []),
        (f'{{"type": "function", {LLAMA[1:]}', "", [CALL]),
        ('{"title": "a JSON answer", "n": 1}', '{"title": "a JSON answer", "n": 1}', []),
        ("{}", "{}", []),
        ("<|python", "<|python", []),
        ('{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    ],
    "mistral": [
        ("Just text [1].", "Just text [1].", []),
        (f"[TOOL_CALLS][{WEATHER}]", "", [CALL]),
        (f"Yes.[TOOL_CALLS] [{WEATHER}, {WEATHER}] Done", "Yes. Done", [CALL, CALL]),
        (f"[TOOL_CALLS]get_weather{ARGUMENTS}[TOOL_CALLS]now{{}}", "", [CALL, ("now", "{}")]),
        (f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}", "", [CALL]),
        (f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}", "", [CALL]),
        ("[TOOL_CALLS]send_mail[ARGS]{}", "[TOOL_CALLS]send_mail[ARGS]{}", []),
        ("[TOOL_CALLS]get_weather{}", "[TOOL_CALLS]get_weather{}", []),
        (f"[TOOL_CALLS][{WEATHER}, 5]", ", 5]", [CALL]),
    ],
    "deepseek_v3": [
        ("Just text ```json.", "Just text ```json.", []),
        (f"{BEGIN}{DEEPSEEK}{END}", "", [CALL]),
        (f"I look.{BEGIN}{DEEPSEEK}\n{DEEPSEEK}{END} Done", "I look. Done", [CALL, CALL]),
        (f"{BEGIN}{DEEPSEEK_31}{DEEPSEEK_31}{END}", "", [CALL, CALL]),
        (f"{BEGIN}{DEEPSEEK_31[:-3]}", "", [CALL]),
        (f"{BEGIN}nothing", f"{BEGIN}nothing", []),
    ],
    "qwen3_coder": [
        ("Just <text>.", "Just <text>.", []),
        (f"<tool_call>\n{XML}\n</tool_call>", "", [CALL]),
        (f"I look.\n<tool_call>\n{XML}\n</tool_call>\n<tool_call>{XML}</tool_call> B", "I look. B", [CALL, CALL]),
        (XML, "", [CALL]),
        ("<tool_call><function=now></function></tool_call>", "", [("now", "{}")]),
        (
            "<function=get_weather><parameter=city>\n\n<b>\n</parameters>\n\n</parameter>"
            "<parameter=exact>True</parameter><parameter=height>1e3</parameter>"
            "<parameter=days>none at all</parameter><parameter=new>5</parameter></function>",
            "",
            [
                (
                    "get_weather",
                    '{"city": "\\n<b>\\n</parameters>\\n", "exact": true, "height": 1000.0, '
                    '"days": "none at all", "new": "5"}',
                )
            ],
        ),
        (
            "<function=odd><parameter=a>1</parameter><parameter=b>x</parameter></function>",
            "",
            [("odd", '{"a": "1", "b": "x"}')],
        ),
        ("<function=get_weather></function>", "<function=get_weather></function>", []),
        ("<tool_call><function=f></function>", "<tool_call><function=f></function>", []),
        ("<function=get_weather><parameter=city>\nKö", "", [("get_weather", '{"city": "Kö')]),
    ],
}
ALL = [(name, *case) for name, cases in CASES.items() for case in cases]


def parse(make: Callable[[], ToolParser], text: str, cuts: list[int]) -> Found:
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
            assert delta.index == len(calls) - 1 and delta.name is None and delta.id is None and delta.arguments
            calls[-1][1] += delta.arguments
    assert len(ids) == len(calls)
    return "".join(part.content for part in found), [(name, arguments) for name, arguments in calls]


def free(name: str, **options: Any) -> Callable[[], ToolParser]:
    return lambda: format_named(name)(OFFERED, **options)


@pytest.mark.parametrize(("name", "text", "content", "calls"), ALL, ids=[f"{name}: {text}" for name, text, *_ in ALL])
def test_a_format(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(free(name), text, []) == (content, calls)
    assert parse(free(name), text, list(range(1, len(text)))) == (content, calls)


PIECES = [
    *("<tool_call>", "</tool_call>", "<function=", "now>", "<parameter=", "city>", "</parameter>", "</function>", "\n"),
    *(WEATHER, LLAMA, XML, DEEPSEEK, DEEPSEEK_31, "[TOOL_CALLS]", "[", "]", "{", "}", ", ", "; ", " ", '"', "a", ":"),
    *(BEGIN, END, ONE, ONE_END, SEP, "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<", "get_weather", '{"name": "now"}'),
]


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(PIECES), max_size=8), st.data())
def test_what_is_found_does_not_depend_on_how_the_text_was_cut(
    name: str, pieces: list[str], data: st.DataObject
) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=8))) if text else []
    whole = parse(free(name), text, [])
    assert parse(free(name), text, [cut for cut in cuts if cut < len(text)]) == whole
    assert parse(free(name), text, list(range(1, len(text)))) == whole
    if not whole[1] and name != "deepseek_v3":
        assert whole[0] == text


@given(st.text(), st.booleans())
def test_every_text_can_be_an_argument(value: str, is_cut: bool) -> None:
    arguments = json.dumps({"city": value})
    texts = {
        "hermes": f'<tool_call>{{"name": "get_weather", "arguments": {arguments}}}</tool_call>',
        "llama3_json": f'{{"name": "get_weather", "parameters": {arguments}}}',
        "mistral": f"[TOOL_CALLS]get_weather{arguments}",
        "deepseek_v3": f"{ONE}get_weather{SEP}{arguments}{ONE_END}",
        "qwen3_coder": f"<function=get_weather><parameter=city>\n{value}\n</parameter></function>",
    }
    for name, text in texts.items():
        content, calls = parse(free(name), text, list(range(1, len(text))) if is_cut else [])
        assert content == "" and json.loads(calls[0][1]) == {"city": value}


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_forced_calls(count: int) -> None:
    text = "[" + ", ".join([LLAMA] * count) + "]"
    for cuts in ([], list(range(1, len(text)))):
        assert parse(lambda: ListedCalls(None), text, cuts) == ("", [CALL] * count)


def test_a_named_function_takes_the_whole_answer_as_its_arguments() -> None:
    assert parse(lambda: NamedParser("get_weather"), ARGUMENTS, [3, 9]) == ("", [CALL])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", f"<tool_call>{WEATHER}</tool_call><tool_call>{WEATHER}</tool_call>"),
        ("llama3_json", f"{LLAMA}; {LLAMA}"),
        ("mistral", f"[TOOL_CALLS][{WEATHER}, {WEATHER}]"),
        ("deepseek_v3", f"{BEGIN}{DEEPSEEK}{DEEPSEEK}{END}"),
        ("qwen3_coder", f"<tool_call>{XML}</tool_call><tool_call>{XML}</tool_call>"),
    ],
)
def test_only_the_first_call_counts_where_calls_may_not_be_parallel(name: str, text: str) -> None:
    assert parse(free(name, max_calls=1), text, [30]) == ("", [CALL])
    assert parse(free(name), text, [30]) == ("", [CALL, CALL])


@pytest.mark.parametrize(
    ("name", "before", "streamed"),
    [
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": ', '"long te'),
        ("qwen3_coder", "<function=get_weather><parameter=city>", "long te"),
    ],
)
def test_arguments_are_streamed_as_they_come(name: str, before: str, streamed: str) -> None:
    parser = free(name)()
    (first,) = parser.feed(before).calls
    assert first.name == "get_weather" and first.id is not None
    (delta,) = parser.feed(streamed).calls
    assert delta.arguments == streamed


def test_a_call_waits_for_its_required_arguments_and_not_longer() -> None:
    parser = free("hermes")()
    assert parser.feed('<tool_call>{"name": "get_weather", "arguments": {"unit": "C", "city"').calls == []
    (delta,) = parser.feed(":").calls
    assert delta.arguments == '{"unit": "C", "city":'


def test_a_text_of_many_marks_is_read_in_linear_time() -> None:
    text = "<tool_call><function=get_weather><parameter=unit>" * 20_000 + "</parameter></function>"
    assert parse(free("qwen3_coder"), text, []) == (text, [])


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
    signs = {
        "… within <tool_call></tool_call> XML tags …": "hermes",
        "{{ '<|python_tag|>' }}": "llama3_json",
        "<tool_call>\n<function=f>": "qwen3_coder",
        "{{ '[TOOL_CALLS]' }}": "mistral",
        f"{{{{ '{BEGIN}{ONE}' }}}}": "deepseek_v3",
    }
    assert {sign: format_of(sign) for sign in signs} == {sign: FORMATS[name] for sign, name in signs.items()}
    assert format_of("{{ messages }}") is None
    with pytest.raises(ConfigError, match="tool_call_parser='odd': must be one of hermes, "):
        format_named("odd")


@pytest.mark.parametrize("depth, is_call", [(MAX_DEPTH - 1, True), (MAX_DEPTH, False), (100_000, False)])
def test_a_value_nested_past_all_reason_is_no_call(depth: int, is_call: bool) -> None:
    arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
    text = f'{{"parameters": {arguments}, "name": "odd"}}'
    assert parse(free("llama3_json"), text, []) == (("", [("odd", arguments)]) if is_call else (text, []))

"""Reasoning is told from the answer however the text was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.reasoning import REASONING, reasoning_named


def split(name: str, text: str, cuts: list[int], *, is_open: bool = False, is_shown: bool = True) -> tuple[str, str]:
    parser = reasoning_named(name)(is_open=is_open, is_shown=is_shown)
    found = [parser.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found.append(parser.finish())
    return "".join(one.reasoning for one in found), "".join(one.content for one in found)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nHm, 1 < 2.\n</think>\n\nYes.\n", False, ("Hm, 1 < 2.", "Yes.\n")),
        ("Hm.</think>Yes.", True, ("Hm.", "Yes.")),
        ("\n<think>Hm.</think>Yes.", True, ("Hm.", "Yes.")),
        ("Hm.</thi", True, ("Hm.</thi", "")),
        ("Hm", True, ("Hm", "")),
        ("<think></think>Yes", False, ("", "Yes")),
        ("<thinking> is fun </think>", False, ("", "<thinking> is fun </think>")),
        (" Yes. <think>no</think>", False, ("", " Yes. <think>no</think>")),
        ("<thi", False, ("", "<thi")),
        ("", False, ("", "")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
    ],
)
def test_reasoning_and_content(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    for cuts in ([], list(range(1, len(text)))):
        assert split("qwen3", text, cuts, is_open=is_open) == expected
        assert split("qwen3", text, cuts, is_open=is_open, is_shown=False) == ("", expected[1])


@given(
    st.sampled_from(sorted(REASONING)),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", " ", "\n", "a", "</"]), max_size=9),
    st.booleans(),
    st.data(),
)
def test_nothing_depends_on_how_the_text_was_cut(
    name: str, pieces: list[str], is_open: bool, data: st.DataObject
) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=6))) if len(text) > 1 else []
    assert split(name, text, cuts, is_open=is_open) == split(name, text, [], is_open=is_open)


def test_the_end_of_the_prompt_says_whether_the_answer_begins_within_reasoning() -> None:
    qwen3, deepseek_r1 = REASONING["qwen3"], REASONING["deepseek_r1"]
    assert qwen3.is_open_after("<assistant>\n", {}) is False
    assert qwen3.is_open_after("<assistant><think>\n", {"enable_thinking": True}) is True
    assert qwen3.is_open_after("<assistant><think>\n\n</think>\n\n", {}) is None
    assert qwen3.is_open_after("<assistant>", {"enable_thinking": False}) is None
    assert deepseek_r1.is_open_after("<assistant>", {}) is True
    assert deepseek_r1.is_open_after("<assistant></think>", {}) is None
    with pytest.raises(ConfigError, match="reasoning_parser='odd': must be one of deepseek_r1, qwen3"):
        reasoning_named("odd")

"""The key: what begins alike meets, what differs early does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.router.prefix_key import MAX_KEY_TOKENS, key_length, prefix_key

SYSTEM_PROMPT = list(range(1000, 1000 + 2 * MAX_KEY_TOKENS))


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    assert prefix_key(range(1000)) == 0xD12BA3BA3964C7ED
    assert prefix_key([5, 6, 7]) == 0xE2D593246BAA1915


@pytest.mark.parametrize(
    "num_tokens,length",
    [(0, 0), (1, 1), (2, 2), (3, 2), (31, 16), (32, 32), (255, 128), (256, 256), (257, 256), (10**6, 256)],
)
def test_a_key_covers_a_power_of_two_tokens_up_to_the_most(num_tokens: int, length: int) -> None:
    assert key_length(num_tokens) == length


@given(question=st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_prompts_with_one_long_system_prompt_have_one_key(question: list[int]) -> None:
    assert prefix_key(SYSTEM_PROMPT + question) == prefix_key(SYSTEM_PROMPT)


def test_short_prompts_with_one_beginning_and_two_endings_have_one_key() -> None:
    document = list(range(100))
    assert prefix_key([*document, 1, 2, 3]) == prefix_key([*document, 7, 8, 9, 10, 11])


@given(first=st.integers(0, 2**31 - 1), second=st.integers(0, 2**31 - 1))
def test_prompts_that_differ_in_the_first_token_have_different_keys(first: int, second: int) -> None:
    assert (prefix_key([first, *SYSTEM_PROMPT]) == prefix_key([second, *SYSTEM_PROMPT])) == (first == second)


def test_an_empty_prompt_has_a_key_too() -> None:
    assert prefix_key([]) == prefix_key([])

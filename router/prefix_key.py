"""The part of a prompt that decides its lane."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

MAX_KEY_TOKENS = 256
"""Long enough to tell system prompts and documents apart that begin alike; short enough that a long common
prefix followed by different questions has one key. More would be lost on it: computing 256 tokens costs about
one step, so prompts that share less have little to gain from meeting in one lane."""


def key_length(num_tokens: int) -> int:
    """Tokens of a prompt that make its key: 256, or the largest power of two that a shorter prompt reaches.

    At least the first half of a short prompt, then, but not all of it: the same text with two different
    questions at its end should still meet, and a growing conversation changes its key only now and then.
    """
    if num_tokens >= MAX_KEY_TOKENS:
        return MAX_KEY_TOKENS
    return 1 << (num_tokens.bit_length() - 1) if num_tokens else 0


def prefix_key(prompt_token_ids: Sequence[int]) -> int:
    """64 bits that any router computes alike for prompts that begin alike."""
    prefix = prompt_token_ids[: key_length(len(prompt_token_ids))]
    return xxhash.xxh3_64_intdigest(memoryview(array("I", prefix)).cast("B"))

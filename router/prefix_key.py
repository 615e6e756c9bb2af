"""A prompt's key for the ring: a hash of its first tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

MAX_KEY_TOKENS = 256
"""Long enough to tell apart system prompts that begin alike, short enough that questions about one document have one
key. Prompts that share fewer tokens, about one step's work, gain little from one lane."""


def key_length(num_tokens: int) -> int:
    """Tokens that make the key: 256, or the largest power of two that a shorter prompt has.

    So a short text keeps its key with any question at its end, and a growing conversation rarely changes it.
    """
    if num_tokens >= MAX_KEY_TOKENS:
        return MAX_KEY_TOKENS
    return 1 << (num_tokens.bit_length() - 1) if num_tokens else 0


def prefix_key(prompt_token_ids: Sequence[int]) -> int:
    """64 bits, equal in all routers and for all prompts that begin alike."""
    prefix = prompt_token_ids[: key_length(len(prompt_token_ids))]
    return xxhash.xxh3_64_intdigest(memoryview(array("I", prefix)).cast("B"))

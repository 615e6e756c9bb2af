"""Which lane a router last sent which prefix to: it probably has the KV, even if the ring now names another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stagemesh.config.prefix import block_hashes

TOKENS_PER_ENTRY = 64
"""Prefixes are remembered at multiples of this."""

MAX_ENTRIES = 1 << 16
"""4 Mi tokens of prompts, in about 13 MB."""


class WarmLane(NamedTuple):
    """A lane that was sent the prompt's first `num_tokens` before."""

    lane: str
    num_tokens: int


class PrefixCacheMap:
    """Prefix → lane, for the `max_entries` last used prefixes. An entry ends with the epoch of its lane."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[bytes, tuple[str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def remember(self, hashes: Sequence[bytes], lane: str, epoch: int) -> None:
        """Note that this prompt was sent to `lane`."""
        # Longest first: the shortest prefix of a prompt, which others share, is forgotten last.
        for prefix_hash in reversed(hashes[: self._max_entries]):
            self._entries[prefix_hash] = (lane, epoch)
            self._entries.move_to_end(prefix_hash)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def find(self, hashes: Sequence[bytes], epochs: Mapping[str, int]) -> WarmLane | None:
        """The lane of `epochs` (lane → epoch) with the longest known prefix."""
        for depth in range(len(hashes), 0, -1):
            lane, epoch = self._entries.get(hashes[depth - 1], ("", 0))
            if epochs.get(lane) == epoch:
                return WarmLane(lane, depth * TOKENS_PER_ENTRY)
        return None


def prefix_hashes(prompt_token_ids: Sequence[int]) -> list[bytes]:
    """Hashes of the prompt's first 64, 128, 192, … tokens."""
    return block_hashes(prompt_token_ids, TOKENS_PER_ENTRY)

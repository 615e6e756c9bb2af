"""What a router remembers of where it sent which prefix: a lane known to be warm beats the ring's guess.

It matters when the ring and the past disagree: a lane has joined and the ring gives it keys whose KV lies
elsewhere, or an overload has sent a prefix on to another lane.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stagemesh.config.prefix import block_hashes

TOKENS_PER_ENTRY = 64
"""Steps in which prefixes are remembered. Coarser than a KV block: finer steps would save no more work."""

MAX_ENTRIES = 1 << 16
"""4 Mi tokens of prompts, in about 13 MB; beyond that the least recently used are forgotten."""


class Warm(NamedTuple):
    """A lane that was sent this beginning of the prompt before, and has probably kept its KV."""

    lane: str
    num_tokens: int


class PrefixMemory:
    """Where prefixes went last, at most `max_entries` of them.

    An entry ends with the epoch of its lane: a lane that is wired anew starts with an empty cache.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[bytes, tuple[str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def remember(self, hashes: Sequence[bytes], lane: str, epoch: int) -> None:
        """The prompt with these `prefix_hashes` has been sent to `lane`."""
        # Deepest first, so that of one prompt its beginning is forgotten last: it is what others share.
        for prefix_hash in reversed(hashes[: self._max_entries]):
            self._entries[prefix_hash] = (lane, epoch)
            self._entries.move_to_end(prefix_hash)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def find(self, hashes: Sequence[bytes], epochs: Mapping[str, int]) -> Warm | None:
        """The lane with the longest remembered prefix among those in `epochs` (lane → its epoch now)."""
        for depth in range(len(hashes), 0, -1):
            lane, epoch = self._entries.get(hashes[depth - 1], ("", 0))
            if epochs.get(lane) == epoch:
                return Warm(lane, depth * TOKENS_PER_ENTRY)
        return None


def prefix_hashes(prompt_token_ids: Sequence[int]) -> list[bytes]:
    """Names of the prompt's prefixes of 64, 128, 192, … tokens."""
    return block_hashes(prompt_token_ids, TOKENS_PER_ENTRY)

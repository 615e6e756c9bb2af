"""The KV blocks of a lane: a pool with reference counts, shared by content.

A block is `block_size` KV slots, in exactly one of three places:

    held       reference count > 0: in the block tables of that many running sequences
    evictable  count 0 and its hash is published; reused last, least recently used first
    empty      count 0 and no hash

Only full blocks are published, and a full block is never written again.

Blocks are published and reused before the workers run the steps. That is safe because *every stage runs the plans in
the order of scheduling*, and a layer's KV lives in one stage:

- Publish: when the step that fills the block is complete or, where its last token was a placeholder, with the
  sequence's next step or its end. Only later plans find it, so each stage writes the block before it reads it.
- Reuse: a plan in flight that uses a released block for its old owner runs before the new owner's.
- Abort: a plan that was sent runs in full, so a published block gets its content.
- Re-wiring loses the KV: `reset_prefix_cache` drops every hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Every operation is O(1) per block."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # A stack: the block freed last is the one still warm in the processor's own caches.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        return len(self._empty) + len(self._evictable)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a chain of block hashes. Takes no reference."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, num_new: int, shared: Sequence[int] = ()) -> bool:
        """Whether `num_new` blocks are free beside `shared` (from `match_prefix`)."""
        num_revived = sum(self._ref_counts[block] == 0 for block in shared)
        return num_new + num_revived <= self.num_free_blocks

    def allocate(self, num_new: int, shared: Sequence[int] = ()) -> list[int]:
        """References `shared`, then `num_new` blocks of undefined content. `can_allocate` must hold."""
        for block in shared:
            if self._ref_counts[block] == 0:
                del self._evictable[block]
            self._ref_counts[block] += 1
        fresh = [self._pop_free() for _ in range(num_new)]
        for block in fresh:
            self._ref_counts[block] = 1
        return [*shared, *fresh]

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Publishes a held block. If two blocks have equal content, the first is kept."""
        assert self._ref_counts[block] > 0 and self._hashes[block] is None
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hashes[block] = block_hash

    def release(self, table: Sequence[int]) -> None:
        # Last block first, so that eviction takes a chain from its end: without its start its end is useless.
        for block in reversed(table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._empty.append(block)
                else:
                    self._evictable[block] = None

    def reset_prefix_cache(self) -> None:
        """For when the contents of the blocks are lost."""
        self._empty.extend(self._evictable)
        self._evictable.clear()
        self._block_of.clear()
        self._hashes = [None] * self.num_blocks

    def _pop_free(self) -> int:
        if self._empty:
            return self._empty.pop()
        block, _ = self._evictable.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._block_of[block_hash]
        self._hashes[block] = None
        return block

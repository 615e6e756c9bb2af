"""Who holds which KV block: a pool with reference counts, shared by content.

A block is `block_size` KV slots. It is in exactly one of three places:

    held       reference count > 0: in the block table of that many running sequences
    evictable  count 0, but its content has a published hash; given away last, least recently used first
    empty      count 0 and nobody could find its content

Sharing is by reference and never copies: only full blocks are published, and a full block is never written
again.

Why it is safe to publish and to reuse a block before the workers have done anything: the scheduler runs ahead
of the workers by up to `num_micro_batches` + 1 plans. All that is used here is that *every stage runs the plans in
the order in which they were scheduled*, and that a layer's KV lives in one stage:

- Publish. A block's hash is published when the plan that fills it is closed, or, where its last token was planned
  ahead, with the sequence's next plan or its end. Whoever finds it is in a later plan, so each stage writes the
  block before it reads it. Never in the same plan: then it would also hang on the order of writes and reads
  within one forward pass.
- Reuse. A block given back (finish, abort, preemption) may be handed out at once, though a plan in flight may
  still read or write it for its old owner. That plan runs first everywhere; the new owner's writes come after
  and win.
- Abort in flight. A plan that was sent is run in full, also for a sequence that was aborted meanwhile, so a
  block published for it does get its content.
- The exception is a lane that is wired anew: plans in flight are forgotten and the KV is gone. Then
  `reset_prefix_cache` drops every hash.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """The block pool of one lane. Every operation is O(1) per block touched. Not thread-safe."""

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
        """Blocks that can be handed out: empty or evictable."""
        return len(self._empty) + len(self._evictable)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a chain of block hashes. Takes no reference."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, num_new: int, shared: Sequence[int] = ()) -> bool:
        """Whether `num_new` blocks are left when those in `shared` (from `match_prefix`) are taken too."""
        num_revived = sum(self._ref_counts[block] == 0 for block in shared)
        return num_new + num_revived <= self.num_free_blocks

    def allocate(self, num_new: int, shared: Sequence[int] = ()) -> list[int]:
        """Takes a reference on `shared` and on `num_new` blocks of undefined content, in this order.

        The caller has asked `can_allocate`, and gives all of them back with `release`.
        """
        for block in shared:
            if self._ref_counts[block] == 0:
                del self._evictable[block]
            self._ref_counts[block] += 1
        fresh = [self._pop_free() for _ in range(num_new)]
        for block in fresh:
            self._ref_counts[block] = 1
        return [*shared, *fresh]

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Lets later plans find a held block by its content. Of two with one content the first counts."""
        assert self._ref_counts[block] > 0 and self._hashes[block] is None
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hashes[block] = block_hash

    def release(self, table: Sequence[int]) -> None:
        """Gives back a sequence's references. Blocks that nobody holds now are evictable if published."""
        # Last block first, so that eviction eats a chain from its end: without its head the rest is useless.
        for block in reversed(table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._empty.append(block)
                else:
                    self._evictable[block] = None

    def reset_prefix_cache(self) -> None:
        """Drops every published hash: the memory behind the blocks is lost or no longer to be trusted."""
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

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the books agree with each other and with the running `tables`."""
        holders: Counter[int] = Counter()
        for table in tables:
            check(len(set(table)) == len(table), f"a block is twice in one table: {list(table)}")
            check(all(0 <= block < self.num_blocks for block in table), f"no such block: {list(table)}")
            holders.update(table)
        check(len(set(self._empty)) == len(self._empty), "a block is twice in the empty list")
        empty = set(self._empty)
        for block in range(self.num_blocks):
            ref_count, block_hash = self._ref_counts[block], self._hashes[block]
            num_places = (ref_count > 0) + (block in empty) + (block in self._evictable)
            check(ref_count == holders[block], f"block {block}: {ref_count} for {holders[block]} holders")
            check(num_places == 1, f"block {block} is in {num_places} of held, empty and evictable")
            check(block not in self._evictable or block_hash is not None, f"block {block} lost its hash")
            check(block not in empty or block_hash is None, f"block {block}: empty, but has a hash")
            check(
                block_hash is None or self._block_of.get(block_hash) == block,
                f"block {block} has a hash that leads elsewhere",
            )
        check(
            empty.issubset(range(self.num_blocks)) and self._evictable.keys() <= set(range(self.num_blocks)),
            "a free block does not exist",
        )
        num_hashes = sum(block_hash is not None for block_hash in self._hashes)
        check(len(self._block_of) == num_hashes, "a hash leads to a block that does not have it")
        check(self.enable_prefix_caching or num_hashes == 0, "hashes without prefix caching")

    def check_contents(self, full: Sequence[int], hashes: Sequence[bytes], unfinished: Sequence[int]) -> None:
        """Raises AssertionError unless what is published of a table is full, and under its own hash."""
        for block, block_hash in zip(full, hashes, strict=True):
            check(self._hashes[block] in (None, block_hash), f"block {block} is published as something else")
        for block in unfinished:
            check(self._hashes[block] is None, f"block {block} is published before it is full")
            check(self._ref_counts[block] == 1, f"block {block} is shared before it is full")


def check(ok: bool, message: str) -> None:
    """An assert that also stands under `python -O`: an integrity check must not be compiled away."""
    if not ok:
        raise AssertionError(message)

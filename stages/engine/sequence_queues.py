"""Which sequences wait and which run: admission and preemption against the block pool."""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from collections.abc import Iterable
from operator import attrgetter

from stagemesh.stages.engine.block_manager import BlockManager
from stagemesh.stages.engine.sequence import Sequence, SequenceStatus

_by_order = attrgetter("order")


class SequenceQueues:
    """Both queues are in the order of arrival and priority. Only running sequences hold blocks."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        # Blocks that the step being built fills, by hash: cached when it is complete.
        self._filled: dict[bytes, int] = {}
        self.num_preemptions = 0
        self.prefix_queries = 0
        """Prompt tokens, once per request."""
        self.prefix_hits = 0
        self.prompt_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits, behind those that go before it."""
        if self.waiting and self.waiting[-1].order > sequence.order:
            insort(self.waiting, sequence, key=_by_order)
        else:
            self.waiting.append(sequence)

    def admit(self, chosen: Sequence | None = None) -> Sequence | None:
        """Moves the first waiting sequence, or the chosen one, if there is room, to the running ones; returns it.

        It gets blocks for all of its known tokens, so that no prompt stops half-way.
        """
        # One spare block per running sequence, or a newcomer is preempted again at the next block boundary.
        num_spare = len(self.running)
        if not self.waiting or num_spare >= self.max_num_seqs or not self.blocks.can_allocate(1 + num_spare):
            return None
        sequence, block_size = chosen or self.waiting[0], self.blocks.block_size
        shared: list[int] = []
        # The hidden states of cached tokens are not cached with them.
        if self.blocks.enable_prefix_caching and not sequence.needs_all_hidden:
            # At least the last token is computed: sampling needs its hidden state, and that is not cached.
            hashes = sequence.hash_blocks((sequence.num_tokens - 1) // block_size, block_size)
            shared = self.blocks.match_prefix(hashes)
            if len(shared) < len(hashes) and hashes[len(shared)] in self._filled:
                # This very step fills the next block of the prefix: a step later it need not be computed again.
                return None
        num_new = -(-sequence.num_tokens // block_size) - len(shared)
        if not self.blocks.can_allocate(num_new + num_spare, shared):
            return None
        self.waiting.remove(sequence)  # almost always the first
        insort(self.running, sequence, key=_by_order)
        sequence.status = SequenceStatus.RUNNING
        sequence.block_table = array("i", self.blocks.allocate(num_new, shared))
        sequence.num_published_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * block_size
        if not sequence.was_admitted:
            self._count_admitted(sequence)
        return sequence

    @property
    def lacks_blocks(self) -> bool:
        """The first waiting sequence waits for blocks, not for a place."""
        num_running = len(self.running)
        if not self.waiting or not num_running or num_running >= self.max_num_seqs:
            return False
        num_needed = -(-self.waiting[0].num_tokens // self.blocks.block_size)
        return not self.blocks.can_allocate(num_needed + num_running)

    def _count_admitted(self, sequence: Sequence) -> None:
        sequence.was_admitted = True
        sequence.num_cached_tokens = sequence.num_computed_tokens
        self.prompt_tokens += sequence.num_prompt_tokens
        if self.blocks.enable_prefix_caching:
            self.prefix_queries += sequence.num_prompt_tokens
            self.prefix_hits += sequence.num_cached_tokens

    def reserve_block(self, sequence: Sequence) -> bool:
        """A block for the next token of `sequence`, if need be by preempting a later sequence.

        False: none can be preempted before a step in flight ends.
        """
        if sequence.num_computed_tokens < len(sequence.block_table) * self.blocks.block_size:
            return True
        while not self.blocks.can_allocate(1):
            victim = self._pick_victim()
            if victim is None or victim.order <= sequence.order:
                # Only the later one yields: the first sequence always goes on, so all of them end.
                return False
            self.preempt(victim)
        sequence.block_table.extend(self.blocks.allocate(1))
        return True

    def _pick_victim(self) -> Sequence | None:
        """The latest running sequence that has no work in flight."""
        return next((sequence for sequence in reversed(self.running) if sequence.num_in_flight == 0), None)

    def preempt(self, sequence: Sequence) -> None:
        """It keeps its tokens; its KV may survive as cached blocks."""
        self.running.remove(sequence)
        self._release_blocks(sequence)
        self.num_preemptions += 1
        # Almost always to the very front: waiting sequences mostly came later than running ones.
        position = 0
        while position < len(self.waiting) and self.waiting[position].order < sequence.order:
            position += 1
        self.waiting.insert(position, sequence)

    def preempt_all(self) -> None:
        for sequence in self.running:
            sequence.num_in_flight = 0
            self._release_blocks(sequence)
        self.waiting = deque(sorted([*self.running, *self.waiting], key=_by_order))
        self.running.clear()
        self.blocks.reset_prefix_cache()

    def finish(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release_blocks(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _release_blocks(self, sequence: Sequence) -> None:
        for block_hash, block in self._newly_full(sequence):  # its last token was sampled after it was scheduled
            self.blocks.cache_block(block, block_hash)
        self.blocks.release(sequence.block_table)
        sequence.block_table = array("i")
        sequence.num_published_blocks = 0
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING

    def mark_filled(self, sequence: Sequence) -> None:
        """Notes the blocks that the step being built fills."""
        for block_hash, block in self._newly_full(sequence):
            self._filled.setdefault(block_hash, block)

    def cache_filled_blocks(self) -> None:
        """The step is complete: later steps may share the blocks that it fills."""
        for block_hash, block in self._filled.items():
            self.blocks.cache_block(block, block_hash)
        self._filled.clear()

    def _newly_full(self, sequence: Sequence) -> Iterable[tuple[bytes, int]]:
        """Hash and number of each block that scheduled steps fill with known tokens, once."""
        if not self.blocks.enable_prefix_caching:
            return ()
        block_size = self.blocks.block_size
        first = sequence.num_published_blocks
        last = min(sequence.num_computed_tokens, sequence.num_tokens) // block_size
        if first >= last:
            return ()
        sequence.num_published_blocks = last
        return zip(sequence.hash_blocks(last, block_size)[first:], sequence.block_table[first:last], strict=True)

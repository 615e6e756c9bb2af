"""For tests: queues, steps in flight, block tables and block pool agree, or AssertionError."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from stagemesh.stages.engine.block_manager import BlockManager
from stagemesh.stages.engine.scheduler import Scheduler
from stagemesh.stages.engine.sequence import Sequence, SequenceStatus


def check_scheduler(scheduler: Scheduler) -> None:
    queues = scheduler.queues
    check_blocks(queues.blocks, [sequence.block_table for sequence in queues.running])
    for status, queue in ((SequenceStatus.RUNNING, queues.running), (SequenceStatus.WAITING, queues.waiting)):
        orders = [sequence.order for sequence in queue]
        check(orders == sorted(set(orders)), f"{status}: not in order: {orders}")
        check(all(sequence.status is status for sequence in queue), f"{status}: one is not")
    queued = {sequence.request_id: sequence for sequence in (*queues.running, *queues.waiting)}
    check(queued == scheduler._sequences, "requests and queues differ")
    check(len(queues.running) <= queues.max_num_seqs, "more than max_num_seqs are running")
    check(len(scheduler._in_flight) <= scheduler.num_micro_batches + 1, "too many steps in flight")
    check(not queues._filled, "blocks filled by a complete step are not cached")
    in_flight = Counter(entry.sequence.seq_id for step in scheduler._in_flight for entry in step.entries)
    for sequence in queued.values():
        _check_sequence(queues.blocks, sequence, in_flight[sequence.seq_id])


def _check_sequence(blocks: BlockManager, sequence: Sequence, num_in_flight: int) -> None:
    name = f"sequence {sequence.seq_id}"
    num_slots = len(sequence.block_table) * blocks.block_size
    num_computed = sequence.num_computed_tokens
    num_ahead = min(1, max(0, sequence.num_in_flight - 1))
    check(num_computed <= num_slots, f"{name}: computed without a slot")
    check(num_computed <= sequence.num_tokens + num_ahead, f"{name}: computed without a token")
    check(sequence.num_in_flight == num_in_flight, f"{name}: steps in flight")
    check(sequence.num_tokens < sequence.max_num_tokens, f"{name}: is too long and still there")
    if sequence.status is SequenceStatus.WAITING:
        check(num_slots == 0 and sequence.num_in_flight == 0, f"{name}: waits, but has blocks")
    if blocks.enable_prefix_caching:
        num_full = min(num_computed, sequence.num_tokens) // blocks.block_size
        check(sequence.num_published_blocks <= num_full, f"{name}: a block is published before it is full")
        hashes = sequence.hash_blocks(num_full, blocks.block_size)
        check_contents(blocks, sequence.block_table[:num_full], hashes, sequence.block_table[num_full:])


def check_blocks(blocks: BlockManager, tables: Iterable[SequenceOf[int]]) -> None:
    """The pool agrees with itself and with `tables`, those of the running sequences."""
    numbers = range(blocks.num_blocks)
    holders: Counter[int] = Counter()
    for table in tables:
        check(len(set(table)) == len(table), f"a block is twice in one table: {list(table)}")
        check(all(block in numbers for block in table), f"no such block: {list(table)}")
        holders.update(table)
    empty, evictable = set(blocks._empty), blocks._evictable.keys()
    check(len(empty) == len(blocks._empty), "a block is twice in the empty list")
    check(empty.issubset(numbers) and evictable <= set(numbers), "a free block does not exist")
    for block in numbers:
        ref_count, block_hash = blocks._ref_counts[block], blocks._hashes[block]
        num_places = (ref_count > 0) + (block in empty) + (block in evictable)
        check(ref_count == holders[block], f"block {block}: {ref_count} for {holders[block]} holders")
        check(num_places == 1, f"block {block} is in {num_places} of held, empty and evictable")
        check(block not in evictable or block_hash is not None, f"block {block} lost its hash")
        check(block not in empty or block_hash is None, f"block {block}: empty, but has a hash")
        is_indexed = block_hash is None or blocks._block_of.get(block_hash) == block
        check(is_indexed, f"block {block} has a hash that leads elsewhere")
    num_hashes = sum(block_hash is not None for block_hash in blocks._hashes)
    check(len(blocks._block_of) == num_hashes, "a hash leads to a block that does not have it")
    check(blocks.enable_prefix_caching or num_hashes == 0, "hashes without prefix caching")


def check_contents(
    blocks: BlockManager, full: SequenceOf[int], hashes: SequenceOf[bytes], unfinished: SequenceOf[int]
) -> None:
    """The published blocks of a table are full and have their own hashes."""
    for block, block_hash in zip(full, hashes, strict=True):
        check(blocks._hashes[block] in (None, block_hash), f"block {block} is published as something else")
    for block in unfinished:
        check(blocks._hashes[block] is None, f"block {block} is published before it is full")
        check(blocks._ref_counts[block] == 1, f"block {block} is shared before it is full")


def check(ok: bool, message: str) -> None:
    """An assert that `python -O` does not remove."""
    if not ok:
        raise AssertionError(message)

"""The block pool: sharing by content, eviction, and an integrity check that can fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.integrity import check_blocks, check_contents

from stagemesh.config.prefix import block_hashes
from stagemesh.stages.engine.block_manager import BlockManager

HASHES = block_hashes(range(64), block_size=4)


def filled(blocks: BlockManager, num_blocks: int, first: int = 0) -> list[int]:
    """A table of `num_blocks` new blocks, published as a chain that starts at HASHES[first]."""
    table = blocks.allocate(num_blocks)
    for block, block_hash in zip(table, HASHES[first:], strict=False):
        blocks.cache_block(block, block_hash)
    return table


def test_a_new_pool_is_all_free() -> None:
    blocks = BlockManager(8, 4)
    assert blocks.num_free_blocks == 8
    assert blocks.can_allocate(8) and not blocks.can_allocate(9)
    check_blocks(blocks, [])


def test_allocated_blocks_are_distinct_and_come_back() -> None:
    blocks = BlockManager(8, 4)
    first, second = blocks.allocate(3), blocks.allocate(5)
    assert sorted(first + second) == list(range(8))
    assert blocks.num_free_blocks == 0
    check_blocks(blocks, [first, second])
    blocks.release(first)
    check_blocks(blocks, [second])
    blocks.release(second)
    assert blocks.num_free_blocks == 8


def test_a_published_prefix_is_shared_without_a_copy() -> None:
    blocks = BlockManager(8, 4)
    first = filled(blocks, 3)
    shared = blocks.match_prefix(HASHES[:2])
    assert shared == first[:2]
    second = blocks.allocate(1, shared)
    assert second[:2] == first[:2] and second[2] not in first
    check_blocks(blocks, [first, second])
    blocks.release(first)
    check_blocks(blocks, [second])
    assert blocks.num_free_blocks == 5


def test_a_prefix_ends_at_the_first_unknown_block() -> None:
    blocks = BlockManager(8, 4)
    table = filled(blocks, 2)
    assert blocks.match_prefix([HASHES[0], b"unknown", HASHES[1]]) == table[:1]
    assert blocks.match_prefix([]) == []


def test_released_blocks_are_found_again_until_they_are_evicted() -> None:
    blocks = BlockManager(4, 4)
    table = filled(blocks, 3)
    blocks.release(table)
    assert blocks.num_free_blocks == 4
    assert blocks.match_prefix(HASHES[:3]) == table
    again = blocks.allocate(0, table)
    assert again == table and blocks.num_free_blocks == 1
    check_blocks(blocks, [again])


def test_revived_blocks_count_against_the_free_ones() -> None:
    blocks = BlockManager(4, 4)
    table = filled(blocks, 3)
    blocks.release(table)
    assert blocks.can_allocate(1, table) and not blocks.can_allocate(2, table)


def test_empty_blocks_are_used_before_cached_ones_and_the_least_recent_goes_first() -> None:
    blocks = BlockManager(5, 4)
    old = filled(blocks, 2)
    new = filled(blocks, 2, first=2)
    blocks.release(old)
    blocks.release(new)
    used = blocks.allocate(1)
    assert used[0] not in old + new, "one block was empty"
    used += blocks.allocate(1)
    assert used[1] == old[1], "the tail of the chain released first"
    assert blocks.match_prefix(HASHES[:2]) == old[:1]
    blocks.allocate(0, blocks.match_prefix(HASHES[:1]))
    used += blocks.allocate(1)
    assert used[2] == new[1], "the block used again in between was spared"


def test_evicted_blocks_are_never_shared() -> None:
    blocks = BlockManager(2, 4)
    blocks.release(filled(blocks, 2))
    table = blocks.allocate(2)
    assert blocks.match_prefix(HASHES[:2]) == []
    check_blocks(blocks, [table])


def test_of_two_blocks_with_one_content_the_first_is_kept() -> None:
    blocks = BlockManager(4, 4)
    first, second = filled(blocks, 1), filled(blocks, 1)
    assert blocks.match_prefix(HASHES[:1]) == first
    blocks.release(second)
    assert blocks.match_prefix(HASHES[:1]) == first
    blocks.release(first)
    check_blocks(blocks, [])


def test_forgotten_contents_are_not_found_and_leak_nothing() -> None:
    blocks = BlockManager(4, 4)
    blocks.release(filled(blocks, 2))
    held = filled(blocks, 1)
    blocks.reset_prefix_cache()
    assert blocks.match_prefix(HASHES) == []
    assert blocks.num_free_blocks == 3
    check_blocks(blocks, [held])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "forget"]), st.integers(0, 10**6)), max_size=60))
def test_any_order_of_operations_keeps_the_books_straight(operations: list[tuple[str, int]]) -> None:
    """Chains over three alphabets, published right away; the model is the set of held tables."""
    blocks = BlockManager(7, 2)
    tables: list[list[int]] = []
    for operation, number in operations:
        if operation == "take":
            chain = block_hashes([number % 3] * 2 * (1 + number % 4), block_size=2)
            shared = blocks.match_prefix(chain)
            if blocks.can_allocate(len(chain) - len(shared), shared):
                table = blocks.allocate(len(chain) - len(shared), shared)
                for index in range(len(shared), len(chain)):
                    blocks.cache_block(table[index], chain[index])
                tables.append(table)
        elif operation == "drop" and tables:
            blocks.release(tables.pop(number % len(tables)))
        elif operation == "forget":
            blocks.reset_prefix_cache()
        check_blocks(blocks, tables)
        held = {block for table in tables for block in table}
        assert blocks.num_free_blocks == blocks.num_blocks - len(held)


def _busy() -> tuple[BlockManager, list[list[int]]]:
    """Held blocks (one shared), evictable ones and empty ones."""
    blocks = BlockManager(10, 4)
    first = filled(blocks, 2)
    second = blocks.allocate(1, first[:1])
    blocks.release(filled(blocks, 2, first=4))
    check_blocks(blocks, [first, second])
    return blocks, [first, second]


Corruption = Callable[[BlockManager, list[list[int]]], object]

CORRUPTIONS: dict[str, Corruption] = {
    "a leaked reference": lambda b, t: b._ref_counts.__setitem__(t[0][0], 3),
    "a lost reference": lambda b, t: b._ref_counts.__setitem__(t[0][0], 1),
    "a reference on a free block": lambda b, t: b._ref_counts.__setitem__(b._empty[0], 1),
    "a held block that is also empty": lambda b, t: b._empty.append(t[0][1]),
    "a held block that is also evictable": lambda b, t: b._evictable.__setitem__(t[0][1], None),
    "an empty block that is also evictable": lambda b, t: b._evictable.__setitem__(b._empty[0], None),
    "a block that is nowhere": lambda b, t: b._empty.pop(),
    "a block that is empty twice": lambda b, t: b._empty.append(b._empty[0]),
    "an evictable block without a hash": lambda b, t: b._hashes.__setitem__(next(iter(b._evictable)), None),
    "an empty block with a hash": lambda b, t: b._hashes.__setitem__(b._empty[0], HASHES[9]),
    "a hash that leads to another block": lambda b, t: b._block_of.__setitem__(HASHES[0], t[0][1]),
    "a hash that leads to a block without it": lambda b, t: b._block_of.__setitem__(HASHES[9], b._empty[0]),
    "a hash that leads nowhere": lambda b, t: b._block_of.pop(HASHES[0]),
    "a table with a block twice": lambda b, t: t[0].append(t[0][0]),
    "a table with a free block": lambda b, t: t[0].append(b._empty[0]),
    "a table with a block that does not exist": lambda b, t: t[0].append(99),
    "a forgotten table": lambda b, t: t.pop(),
    "an empty block that does not exist": lambda b, t: b._empty.append(99),
    "an evictable block that does not exist": lambda b, t: b._evictable.__setitem__(-5, None),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_integrity_finds(corruption: str) -> None:
    blocks, tables = _busy()
    CORRUPTIONS[corruption](blocks, tables)
    with pytest.raises(AssertionError):
        check_blocks(blocks, tables)


def test_check_contents_finds_a_wrong_hash_and_an_unfinished_block_that_is_shared() -> None:
    blocks, (first, second) = _busy()
    check_contents(blocks, first, HASHES[:2], [])
    check_contents(blocks, first[:1], HASHES[:1], second[1:])
    with pytest.raises(AssertionError, match="something else"):
        check_contents(blocks, first, HASHES[1:3], [])
    with pytest.raises(AssertionError, match="before it is full"):
        check_contents(blocks, [], [], first)
    blocks.reset_prefix_cache()
    with pytest.raises(AssertionError, match="shared before"):
        check_contents(blocks, [], [], first)

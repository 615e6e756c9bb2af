"""The router's memory: the longest prefix wins, old entries go, re-wired lanes are cold."""

from __future__ import annotations

from stagemesh.router.prefix_cache_map import TOKENS_PER_ENTRY, PrefixCacheMap, WarmLane, prefix_hashes

N = TOKENS_PER_ENTRY
TURN_1 = list(range(2 * N))
TURN_2 = list(range(5 * N))
OTHER = [*range(N), *range(7000, 7000 + 2 * N)]
EPOCHS = {"a": 1, "b": 1}


def test_nothing_is_known_of_a_new_prompt_or_a_very_short_one() -> None:
    memory = PrefixCacheMap()
    memory.remember(prefix_hashes(TURN_1), "a", 1)
    assert memory.find(prefix_hashes(OTHER[N:]), EPOCHS) is None
    assert memory.find(prefix_hashes(TURN_1[: N - 1]), EPOCHS) is None


def test_a_conversation_is_found_by_its_earlier_turn() -> None:
    memory = PrefixCacheMap()
    memory.remember(prefix_hashes(TURN_1), "a", 1)
    assert memory.find(prefix_hashes(TURN_2), EPOCHS) == WarmLane("a", 2 * N)


def test_the_longest_prefix_wins_over_a_more_recent_shorter_one() -> None:
    memory = PrefixCacheMap()
    memory.remember(prefix_hashes(TURN_1), "a", 1)
    memory.remember(prefix_hashes(OTHER), "b", 1)
    assert memory.find(prefix_hashes(TURN_2), EPOCHS) == WarmLane("a", 2 * N)
    assert memory.find(prefix_hashes(TURN_1[:N]), EPOCHS) == WarmLane("b", N)


def test_a_lane_that_is_gone_or_was_wired_anew_is_not_warm() -> None:
    memory = PrefixCacheMap()
    memory.remember(prefix_hashes(TURN_1), "a", 1)
    assert memory.find(prefix_hashes(TURN_1), {"b": 1}) is None
    assert memory.find(prefix_hashes(TURN_1), {"a": 2}) is None


def test_a_shorter_prefix_in_a_living_lane_is_found_behind_a_longer_one_in_a_dead_lane() -> None:
    memory = PrefixCacheMap()
    memory.remember(prefix_hashes(TURN_2), "a", 1)
    memory.remember(prefix_hashes(TURN_1), "b", 1)
    assert memory.find(prefix_hashes(TURN_2), {"b": 1}) == WarmLane("b", 2 * N)


def test_the_memory_never_outgrows_its_bound_and_forgets_the_least_recent() -> None:
    memory = PrefixCacheMap(max_entries=6)
    memory.remember(prefix_hashes(TURN_1), "a", 1)
    memory.remember(prefix_hashes(OTHER), "b", 1)
    memory.remember(prefix_hashes(TURN_1), "a", 1)
    memory.remember(prefix_hashes(range(9000, 9000 + 4 * N)), "b", 1)
    assert len(memory) == 6
    assert memory.find(prefix_hashes(TURN_1), EPOCHS) == WarmLane("a", 2 * N)
    assert memory.find(prefix_hashes(OTHER), EPOCHS) == WarmLane("a", N)


def test_a_prompt_longer_than_the_whole_memory_is_remembered_by_its_beginning() -> None:
    memory = PrefixCacheMap(max_entries=3)
    memory.remember(prefix_hashes(TURN_2), "a", 1)
    assert len(memory) == 3
    assert memory.find(prefix_hashes(TURN_2), EPOCHS) == WarmLane("a", 3 * N)

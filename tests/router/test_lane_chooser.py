"""Choosing a lane: sticky, spread, bounded, explained, and the same in every router."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.router.lane_chooser import LaneChoice, LaneChooser, NoLane
from stagemesh.router.load import BOUND_FACTOR, SLACK_TOKENS

LANES = ["lane-0", "lane-1", "lane-2", "lane-3"]


@dataclass
class Said:
    """What a leader says of itself."""

    lane: str
    running_kv_tokens: int = 0
    queued_prefill_tokens: int = 0
    state: str = "serving"
    epoch: int = 1


def chooser(*lanes: str, **settings: int) -> LaneChooser:
    result = LaneChooser(**settings)
    result.set_lanes(lanes)
    for lane in lanes:
        result.update(Said(lane))
    return result


def text(seed: int, num_tokens: int = 300) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50_000) for _ in range(num_tokens)]


def once(router: LaneChooser, prompt: list[int]) -> LaneChoice:
    """A request that is over before the next one comes."""
    choice = router.choose("r", prompt)
    router.finished("r")
    return choice


def settle(router: LaneChooser, loads: dict[str, int]) -> None:
    """Two stats of each lane: whatever was sent before is in them."""
    for _ in range(2):
        for lane, tokens in loads.items():
            router.update(Said(lane, tokens))


def test_without_lanes_there_is_no_choice() -> None:
    with pytest.raises(NoLane):
        LaneChooser().choose("r", [1, 2, 3])


def test_with_one_lane_there_is_one_choice() -> None:
    choice = chooser("a").choose("r", [1, 2, 3])
    assert (choice.lane, choice.reason, choice.fallbacks) == ("a", "only lane", ())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=300), st.lists(st.integers(0, 100), max_size=40))
def test_the_same_long_prefix_keeps_going_to_the_same_lane(prefix: list[int], question: list[int]) -> None:
    prefix = (prefix * 300)[:300]
    router = chooser(*LANES)
    assert once(router, prefix).lane == once(router, prefix + question).lane == once(router, prefix).lane


def test_different_prefixes_use_all_lanes_evenly() -> None:
    router = chooser(*LANES)
    counts = Counter(once(router, text(seed, 40)).lane for seed in range(1000))
    assert all(150 < counts[lane] < 350 for lane in LANES)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5000), min_size=4, max_size=4))
def test_two_routers_agree_without_talking(seed: int, tokens: list[int]) -> None:
    first, second = chooser(*LANES), chooser(*reversed(LANES))
    loads = dict(zip(LANES, tokens, strict=True))
    settle(first, loads)
    settle(second, loads)
    once(first, text(seed + 1))  # what one has seen of other prompts is its own affair
    assert once(first, text(seed)) == once(second, text(seed))


def test_a_lane_that_leaves_moves_only_its_own_prefixes() -> None:
    router = chooser(*LANES)
    before = {seed: once(router, text(seed)).lane for seed in range(200)}
    router.set_lanes(LANES[1:])
    after = {seed: once(router, text(seed)).lane for seed in range(200)}
    assert all(after[seed] == lane for seed, lane in before.items() if lane != LANES[0])
    assert {after[seed] for seed, lane in before.items() if lane == LANES[0]} == set(LANES[1:])


def test_a_lane_that_joins_does_not_take_prefixes_that_are_warm_elsewhere() -> None:
    router = chooser(*LANES[:2])
    before = {seed: once(router, text(seed)).lane for seed in range(100)}
    router.set_lanes(LANES[:3])
    assert {seed: once(router, text(seed)).lane for seed in range(100)} == before
    assert LANES[2] in {once(router, text(seed)).lane for seed in range(100, 150)}


def test_a_restarted_lane_is_no_longer_warm() -> None:
    router = chooser(*LANES)
    first = once(router, text(0))
    assert once(router, text(0)).warm_tokens == 256
    router.update(Said(first.lane, epoch=2))
    again = once(router, text(0))
    assert (again.lane, again.warm_tokens, again.reason) == (first.lane, 0, "ring")


def test_an_overloaded_lane_passes_its_prefix_to_the_next_clockwise_and_gets_it_back() -> None:
    router = chooser(*LANES)
    first = once(router, text(0))
    settle(router, {first.lane: 5000})
    moved = once(router, text(0))
    assert moved.lane == first.fallbacks[0]
    assert moved.reason == "ring, past 1 overloaded; warm lane overloaded"
    assert first.lane == moved.fallbacks[-1], "the overloaded lane is the last resort"
    settle(router, {first.lane: 0})
    assert once(router, text(0)).lane == moved.lane, "it is the warm one now"
    settle(router, {moved.lane: 5000})
    assert once(router, text(0)).lane == first.lane


def test_a_few_requests_at_low_load_stay_together() -> None:
    router = chooser(*LANES)
    chosen = {router.choose(str(number), text(0, 100)).lane for number in range(5)}
    assert len(chosen) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2000), st.integers(2, 8), st.integers(0, 100))
def test_load_stays_bounded_when_everybody_sends_the_same_prompt(size: int, num_lanes: int, seed: int) -> None:
    router = chooser(*(f"lane-{number}" for number in range(num_lanes)))
    loads: Counter[str] = Counter()
    for number in range(150):
        loads[router.choose(str(number), text(seed, size)).lane] += size
        mean = loads.total() / num_lanes
        assert max(loads.values()) <= BOUND_FACTOR * mean + max(size, SLACK_TOKENS) + size


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_load_stays_bounded_under_mixed_traffic_with_stats_in_between(seed: int) -> None:
    rng = random.Random(seed)
    router = chooser(*LANES)
    running: dict[str, tuple[str, int]] = {}
    for number in range(200):
        prompt = text(rng.randrange(10), rng.choice([20, 200, 1500]))
        choice = router.choose(str(number), prompt)
        assert choice.load_tokens <= choice.bound_tokens
        running[str(number)] = (choice.lane, len(prompt))
        if rng.random() < 0.4:
            over = rng.choice(list(running))
            router.finished(over)
            del running[over]
        if rng.random() < 0.2:
            lane = rng.choice(LANES)
            router.update(Said(lane, sum(size for name, size in running.values() if name == lane)))


def test_a_burst_between_two_reports_is_spread() -> None:
    router = chooser(*LANES)
    counts = Counter(router.choose(str(number), text(0)).lane for number in range(200))
    assert set(counts) == set(LANES) and max(counts.values()) < 70


def test_a_draining_lane_gets_nothing_and_is_no_fallback() -> None:
    router = chooser(*LANES)
    first = once(router, text(0))
    router.update(Said(first.lane, state="draining"))
    choice = once(router, text(0))
    assert first.lane not in (choice.lane, *choice.fallbacks)
    for lane in LANES:
        router.update(Said(lane, state="draining"))
    with pytest.raises(NoLane):
        router.choose("r", text(0))


def test_a_healing_lane_is_a_fallback_and_is_chosen_only_when_none_serves() -> None:
    router = chooser(*LANES)
    first = once(router, text(0))
    router.update(Said(first.lane, state="healing"))
    choice = once(router, text(0))
    assert choice.lane == first.fallbacks[0]
    assert choice.fallbacks[-1] == first.lane
    for lane in LANES:
        router.update(Said(lane, state="healing"))
    assert once(router, text(0)).lane in LANES


def test_prompts_that_share_less_than_their_key_are_not_herded_to_one_warm_lane() -> None:
    router = chooser(*LANES)
    template = text(0, 64)
    counts = Counter(once(router, template + text(seed, 300)).lane for seed in range(1, 200))
    assert set(counts) == set(LANES) and max(counts.values()) < 100


def test_choosing_again_for_the_same_request_does_not_count_it_twice() -> None:
    router = chooser(*LANES)
    first = router.choose("r", text(0))
    assert router.choose("r", text(0)).load_tokens == first.load_tokens == 0


def test_a_choice_is_explained() -> None:
    router = chooser(*LANES)
    choice = once(router, text(0))
    assert (choice.reason, choice.warm_tokens, choice.load_tokens) == ("ring", 0, 0)
    assert choice.bound_tokens == SLACK_TOKENS
    assert sorted([choice.lane, *choice.fallbacks]) == LANES
    assert once(router, text(0)).reason == "warm, sent 256 of its tokens before"


def test_the_memory_of_prefixes_is_bounded() -> None:
    router = chooser(*LANES, max_remembered=50)
    for seed in range(100):
        once(router, text(seed))
    assert len(router._prefixes) == 50

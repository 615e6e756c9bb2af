"""Loads: stats plus what was sent since, each request counted until the stats surely show it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from stagemesh.router.load import MAX_OPEN_REQUESTS, LaneLoads, load_bound


@dataclass
class Said:
    """What a leader says of itself."""

    lane: str
    running_kv_tokens: int = 0
    queued_prefill_tokens: int = 0
    state: str = "serving"
    epoch: int = 1


def loads(*lanes: str) -> LaneLoads:
    result = LaneLoads()
    result.set_lanes(lanes)
    return result


def test_a_load_is_queued_prefill_plus_running_kv() -> None:
    lanes = loads("a")
    lanes.update(Said("a", running_kv_tokens=70, queued_prefill_tokens=30))
    assert lanes.lanes["a"].tokens == 100


def test_a_request_counts_from_the_moment_it_is_sent_until_two_reports_later() -> None:
    lanes = loads("a")
    lanes.sent("r", "a", 50)
    assert lanes.lanes["a"].tokens == 50
    lanes.update(Said("a", 7))  # may have been written before the request arrived
    assert lanes.lanes["a"].tokens == 57
    lanes.update(Said("a", 60))  # knows it for sure
    assert lanes.lanes["a"].tokens == 60


def test_a_request_that_ends_early_stops_counting_at_once() -> None:
    lanes = loads("a")
    lanes.sent("now", "a", 50)
    lanes.finished("now")
    assert lanes.lanes["a"].tokens == 0
    lanes.sent("before", "a", 50)
    lanes.update(Said("a"))
    lanes.finished("before")
    assert lanes.lanes["a"].tokens == 0
    lanes.sent("long ago", "a", 50)
    lanes.update(Said("a"))
    lanes.update(Said("a", 50))
    lanes.finished("long ago")
    assert lanes.lanes["a"].tokens == 50
    lanes.finished("never heard of")


def test_a_request_sent_again_counts_for_the_last_lane_only() -> None:
    lanes = loads("a", "b")
    lanes.sent("r", "a", 50)
    lanes.sent("r", "b", 50)
    assert (lanes.lanes["a"].tokens, lanes.lanes["b"].tokens) == (0, 50)


def test_a_lane_that_comes_back_starts_from_nothing() -> None:
    lanes = loads("a", "b")
    lanes.sent("r", "a", 50)
    lanes.set_lanes(["b"])
    lanes.update(Said("a", 10))
    lanes.set_lanes(["a", "b"])
    assert lanes.lanes["a"].tokens == 0
    lanes.finished("r")
    assert lanes.lanes["a"].tokens == 0


def test_open_requests_that_never_end_do_not_fill_the_memory() -> None:
    lanes = loads("a")
    for number in range(MAX_OPEN_REQUESTS + 10):
        lanes.sent(str(number), "a", 1)
    assert len(lanes._open) == MAX_OPEN_REQUESTS


@given(st.lists(st.tuples(st.sampled_from(["send", "end", "say", "leave"]), st.integers(0, 5)), max_size=80))
def test_a_load_is_never_negative_and_ends_at_zero(operations: list[tuple[str, int]]) -> None:
    lanes = loads("a", "b")
    for operation, number in operations:
        lane = "ab"[number % 2]
        if operation == "send":
            lanes.sent(str(number), lane, 10 * number + 1)
        elif operation == "end":
            lanes.finished(str(number))
        elif operation == "say":
            lanes.update(Said(lane))
        else:
            lanes.set_lanes([lane])
            lanes.set_lanes("ab")
        assert all(load.tokens >= 0 and load.sent_tokens >= 0 for load in lanes.lanes.values())
    for number in range(6):
        lanes.finished(str(number))
    assert all(load.tokens == 0 for load in lanes.lanes.values())


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, 10**5))
def test_some_lane_is_always_within_the_bound(tokens: list[int], num_prompt_tokens: int) -> None:
    assert min(tokens) <= load_bound(tokens, num_prompt_tokens)


@given(st.integers(1, 20), st.integers(0, 10**5))
def test_a_lone_request_of_the_same_size_does_not_make_its_lane_overloaded(num_lanes: int, size: int) -> None:
    assert size <= load_bound([size] + [0] * (num_lanes - 1), size)

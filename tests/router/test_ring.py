"""The ring: the same everywhere, evenly shared, and disturbed by a change only where it must be."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.router.ring import HashRing

KEYS = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(4000)]
LANES = [f"lane-{number}" for number in range(8)]

lane_sets = st.sets(st.text("abcdef0123456789", min_size=1, max_size=6), min_size=1, max_size=8)
keys = st.integers(0, 2**64 - 1)


def test_the_ring_is_the_same_in_every_process_and_release() -> None:
    """Written down once: routers of different ages must agree during an update."""
    ring = HashRing(["a", "b", "c"])
    assert ring.lanes_from(0) == ["b", "c", "a"]
    assert ring.lanes_from(2**62) == ["c", "a", "b"]
    assert ring.lanes_from(2**63) == ["b", "a", "c"]
    assert ring.lanes_from(2**64 - 1) == ["b", "c", "a"]


@settings(max_examples=50, deadline=None)
@given(lanes=lane_sets, key=keys)
def test_every_lane_is_met_once_in_an_order_that_depends_on_the_set_only(lanes: set[str], key: int) -> None:
    order = HashRing(sorted(lanes)).lanes_from(key)
    assert sorted(order) == sorted(lanes)
    assert order == HashRing(sorted(lanes, reverse=True)).lanes_from(key)


@settings(max_examples=50, deadline=None)
@given(lanes=lane_sets, key=keys)
def test_a_lane_that_leaves_only_drops_out_of_the_order(lanes: set[str], key: int) -> None:
    order = HashRing(lanes).lanes_from(key)
    for gone in lanes:
        assert HashRing(lanes - {gone}).lanes_from(key) == [lane for lane in order if lane != gone]


def test_a_ring_without_lanes_has_nobody() -> None:
    assert HashRing([]).lanes_from(5) == []


def test_keys_are_shared_evenly() -> None:
    ring = HashRing(LANES)
    counts = Counter(ring.lanes_from(key)[0] for key in KEYS)
    mean = len(KEYS) / len(LANES)
    assert all(0.6 * mean < counts[lane] < 1.4 * mean for lane in LANES)


def test_a_lane_that_joins_takes_its_share_and_moves_nothing_else() -> None:
    before, after = HashRing(LANES[:-1]), HashRing(LANES)
    moved = [key for key in KEYS if before.lanes_from(key)[0] != after.lanes_from(key)[0]]
    assert {after.lanes_from(key)[0] for key in moved} == {LANES[-1]}
    assert 0.5 / len(LANES) < len(moved) / len(KEYS) < 1.5 / len(LANES)


def test_the_keys_of_a_full_lane_go_on_to_many_others() -> None:
    ring = HashRing(LANES)
    orders = [ring.lanes_from(key) for key in KEYS]
    heirs = Counter(order[1] for order in orders if order[0] == LANES[0])
    assert len(heirs) == len(LANES) - 1
    assert max(heirs.values()) < 0.5 * heirs.total()

"""A consistent-hash ring (Karger et al. 1997): the lane of a key, the same in every router.

Each lane has many points on a circle of 64-bit numbers; a key belongs to the first point clockwise. A lane that joins
or leaves moves only its own keys, and those of an overloaded lane go to many lanes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import chain

import xxhash

POINTS_PER_LANE = 128
"""The lanes' shares differ by about 1/sqrt(128), 9 %."""


class HashRing:
    """An immutable ring over lane names."""

    def __init__(self, lanes: Iterable[str]) -> None:
        lanes = set(lanes)
        points = sorted(
            (xxhash.xxh3_64_intdigest(f"{lane}#{number}".encode()), lane)
            for lane in lanes
            for number in range(POINTS_PER_LANE)
        )
        self._num_lanes = len(lanes)
        self._places = [place for place, _ in points]
        self._owners = [lane for _, lane in points]

    def lanes_from(self, key: int) -> list[str]:
        """Every lane once, in the order of their first points clockwise from `key`."""
        start = bisect_left(self._places, key)
        lanes: dict[str, None] = {}
        for place in chain(range(start, len(self._owners)), range(start)):
            lanes[self._owners[place]] = None
            if len(lanes) == self._num_lanes:
                break
        return list(lanes)

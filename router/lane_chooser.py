"""Chooses the lane of a request and says why; equal inputs give equal choices.

1. The ring orders the lanes by the prompt's key, alike in every router.
2. A lane that was sent at least the key's tokens comes first.
3. A lane with a load above the bound is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stagemesh.router.load import LaneLoads, Stats, load_bound
from stagemesh.router.prefix_cache_map import MAX_ENTRIES, PrefixCacheMap, prefix_hashes
from stagemesh.router.prefix_key import key_length, prefix_key
from stagemesh.router.ring import HashRing

SILENT = "silent"
_RANKS = {"serving": 0, "healing": 1, "starting": 1}
"""By state, lower is better; others get no request."""


class NoLane(LookupError):
    """No lane can take a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneChoice:
    """The lane of one request, and why."""

    lane: str
    reason: str
    """Plain ASCII, fit for a response header."""
    fallbacks: tuple[str, ...]
    """The other lanes, best first."""
    warm_tokens: int
    """Prompt tokens that `lane` was sent before; 0 = unknown."""
    load_tokens: int
    """Load of `lane` before this request."""
    bound_tokens: int
    """Load up to which a lane was eligible."""


class LaneChooser:
    """One router's choices. Memory: per lane, open request and `max_remembered` prefixes. Not thread-safe."""

    def __init__(self, max_remembered: int = MAX_ENTRIES) -> None:
        self._loads = LaneLoads()
        self._prefixes = PrefixCacheMap(max_remembered)
        self._ring = HashRing(())

    def set_lanes(self, lanes: Iterable[str]) -> None:
        names = set(lanes)
        if names != self._loads.lanes.keys():
            self._loads.set_lanes(sorted(names))
            self._ring = HashRing(names)

    def update(self, stats: Stats) -> None:
        self._loads.update(stats)

    def silence(self, lane: str) -> None:
        """No request goes to a known lane until its next report."""
        self._loads.lanes[lane].state = SILENT

    def finished(self, request_id: str) -> None:
        """Drop the request's load. An unknown id is no error."""
        self._loads.finished(request_id)

    def choose(self, request_id: str, prompt_token_ids: Sequence[int]) -> LaneChoice:
        """Choose a lane and count the request for it, in place of an earlier choice. Raises NoLane."""
        self._loads.finished(request_id)
        hashes = prefix_hashes(prompt_token_ids)
        choice = self._rank(prompt_token_ids, hashes)
        self._loads.sent(request_id, choice.lane, len(prompt_token_ids))
        self._prefixes.remember(hashes, choice.lane, self._loads.lanes[choice.lane].epoch)
        return choice

    def _rank(self, prompt_token_ids: Sequence[int], hashes: list[bytes]) -> LaneChoice:
        lanes = {name: lane for name, lane in self._loads.lanes.items() if lane.state in _RANKS}
        if not lanes:
            raise NoLane("no lane is running")
        best = min(_RANKS[lane.state] for lane in lanes.values())
        clockwise = [name for name in self._ring.lanes_from(prefix_key(prompt_token_ids)) if name in lanes]
        ready = [name for name in clockwise if _RANKS[lanes[name].state] == best]
        bound = load_bound([lanes[name].tokens for name in ready], len(prompt_token_ids))
        eligible = [name for name in ready if lanes[name].tokens <= bound]
        first = eligible[0]
        num_passed = ready.index(first)
        reason = f"ring, past {num_passed} overloaded" if num_passed else "ring"
        warm_tokens = 0
        warm = self._prefixes.find(hashes, {name: lanes[name].epoch for name in ready})
        # Fewer tokens than the key's are shared by many prompts, which the ring spreads on purpose.
        if warm is not None and warm.num_tokens >= key_length(len(prompt_token_ids)):
            if warm.lane in eligible:
                first, warm_tokens = warm.lane, warm.num_tokens
                reason = f"warm, sent {warm_tokens} of its tokens before"
            else:
                reason += "; warm lane overloaded"
        if len(lanes) == 1:
            reason = "only lane"
        ranked = dict.fromkeys([*eligible, *ready, *clockwise])
        return LaneChoice(
            lane=first,
            reason=reason,
            fallbacks=tuple(name for name in ranked if name != first),
            warm_tokens=warm_tokens,
            load_tokens=lanes[first].tokens,
            bound_tokens=int(bound),
        )

"""Which lane a request goes to, and why. No Ray, no torch, no clock: the same inputs give the same choice.

1. The ring orders the lanes for the prompt's key (its first tokens), the same in every router.
2. A lane that this router knows to hold at least the key's tokens comes before the ring's first.
3. Either is skipped while its load is above the bound; the next lane clockwise takes the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stagemesh.router.load import LaneLoads, Stats, load_bound
from stagemesh.router.prefix_cache_map import MAX_ENTRIES, PrefixMemory, prefix_hashes
from stagemesh.router.prefix_key import key_length, prefix_key
from stagemesh.router.ring import HashRing

_RANKS = {"serving": 0, "healing": 1, "starting": 1}
"""Lower is better. A draining lane, or one in a state unknown here, gets nothing new."""


class NoLane(LookupError):
    """No lane runs that could take a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A lane for one request, with everything needed to explain it."""

    lane: str
    reason: str
    """Plain ASCII, fit for a response header."""
    fallbacks: tuple[str, ...]
    """The other lanes that may take it, best first."""
    warm_tokens: int
    """Prompt tokens that this router believes `lane` to hold; 0 = unknown."""
    load_tokens: int
    """Load of `lane` before this request."""
    bound_tokens: int
    """Load up to which a lane was eligible."""


class LaneChooser:
    """One router's choices. Memory is bounded: per lane, per open request, and `max_remembered` prefixes.

    Not thread-safe.
    """

    def __init__(self, max_remembered: int = MAX_ENTRIES) -> None:
        self._loads = LaneLoads()
        self._memory = PrefixMemory(max_remembered)
        self._ring = HashRing(())

    def set_lanes(self, lanes: Iterable[str]) -> None:
        """The lanes that run now, in any order."""
        names = set(lanes)
        if names != self._loads.lanes.keys():
            self._loads.set_lanes(sorted(names))
            self._ring = HashRing(names)

    def update(self, stats: Stats) -> None:
        """Takes a leader's word about itself."""
        self._loads.update(stats)

    def finished(self, request_id: str) -> None:
        """The request is over (or was never sent). Ignores an unknown id."""
        self._loads.finished(request_id)

    def choose(self, request_id: str, prompt_token_ids: Sequence[int]) -> Choice:
        """Chooses a lane and counts the request for it. Raises NoLane.

        Calling it again for the same request replaces the earlier choice.
        """
        self._loads.finished(request_id)
        hashes = prefix_hashes(prompt_token_ids)
        choice = self._rank(prompt_token_ids, hashes)
        self._loads.sent(request_id, choice.lane, len(prompt_token_ids))
        self._memory.remember(hashes, choice.lane, self._loads.lanes[choice.lane].epoch)
        return choice

    def _rank(self, prompt_token_ids: Sequence[int], hashes: list[bytes]) -> Choice:
        lanes = {name: lane for name, lane in self._loads.lanes.items() if lane.state in _RANKS}
        if not lanes:
            raise NoLane("no lane is running")
        best = min(_RANKS[lane.state] for lane in lanes.values())
        ready = {name: lane for name, lane in lanes.items() if _RANKS[lane.state] == best}
        bound = load_bound((lane.tokens for lane in ready.values()), len(prompt_token_ids))
        clockwise = [name for name in self._ring.lanes_from(prefix_key(prompt_token_ids)) if name in lanes]
        eligible = [name for name in clockwise if name in ready and lanes[name].tokens <= bound]
        first = eligible[0]
        num_passed = [name for name in clockwise if name in ready].index(first)
        reason = f"ring, past {num_passed} overloaded" if num_passed else "ring"
        warm_tokens = 0
        warm = self._memory.find(hashes, {name: lane.epoch for name, lane in ready.items()})
        # Only what covers the key counts: less is shared by many prompts that the ring spreads on purpose.
        if warm is not None and warm.num_tokens >= key_length(len(prompt_token_ids)):
            if warm.lane in eligible:
                first, warm_tokens = warm.lane, warm.num_tokens
                reason = f"warm, sent {warm_tokens} of its tokens before"
            else:
                reason += "; warm lane overloaded"
        if len(lanes) == 1:
            reason = "only lane"
        ranked = [*eligible, *(name for name in clockwise if name in ready), *clockwise]
        return Choice(
            lane=first,
            reason=reason,
            fallbacks=tuple(name for name in dict.fromkeys(ranked) if name != first),
            warm_tokens=warm_tokens,
            load_tokens=lanes[first].tokens,
            bound_tokens=int(bound),
        )

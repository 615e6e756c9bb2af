"""How loaded each lane is, in tokens: what its leader last said, plus what this router has sent it since.

Tokens and not requests, because a request of 30 000 tokens is not as heavy as one of 30.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

BOUND_FACTOR = 1.25
"""A lane above this times the mean passes its keys on (Mirrokni et al., arXiv:1608.01350)."""

SLACK_TOKENS = 512
"""See `load_bound`."""

MAX_OPEN_REQUESTS = 1 << 16
"""Requests that can still be taken back when they end early; for older ones the next stats do it."""


def load_bound(loads: Iterable[int], num_prompt_tokens: int) -> float:
    """Load in tokens up to which a lane takes a request: 1.25 x the mean plus a slack.

    The slack is the request's own prompt, or SLACK_TOKENS if that is more. A mean alone would be nonsense
    at low load: of two lanes the only busy one is always at twice the mean. Moving on costs a computation
    of the whole prompt in a cold lane, so a lane has to be ahead of the others by more than that before it
    is left; and below SLACK_TOKENS (a fraction of one step's batch) a difference is noise between two
    stats. The lane with the least load is never above the bound, so there is always one to go to.
    """
    loads = list(loads)
    return BOUND_FACTOR * sum(loads) / max(len(loads), 1) + max(num_prompt_tokens, SLACK_TOKENS)


class Stats(Protocol):
    """The part of a leader's LaneStats that is read here."""

    @property
    def lane(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def queued_prefill_tokens(self) -> int: ...
    @property
    def running_kv_tokens(self) -> int: ...


@dataclass(slots=True)
class LaneLoad:
    """One lane as this router sees it. A lane that has not spoken yet is taken for serving and empty."""

    state: str = "serving"
    epoch: int = 0
    reported_tokens: int = 0
    num_reports: int = 0
    sent_tokens: int = 0
    """Sent since the last stats."""
    unsure_tokens: int = 0
    """Sent between the last two stats: the last may have been written before they arrived."""

    @property
    def tokens(self) -> int:
        return self.reported_tokens + self.sent_tokens + self.unsure_tokens


class LaneLoads:
    """Loads of the lanes that run now.

    Requests count from the moment they are sent, so that a burst between two stats is spread as well.
    Memory: one record per lane and per open request, at most MAX_OPEN_REQUESTS. Not thread-safe.
    """

    def __init__(self) -> None:
        self.lanes: dict[str, LaneLoad] = {}
        # request id → lane, stats heard when it was sent, tokens
        self._open: OrderedDict[str, tuple[LaneLoad, int, int]] = OrderedDict()

    def set_lanes(self, names: Iterable[str]) -> None:
        """The lanes that run now; what is known of the others is forgotten."""
        self.lanes = {name: self.lanes.get(name) or LaneLoad() for name in names}

    def update(self, stats: Stats) -> None:
        """Takes a leader's word. A lane that is not among those running is ignored."""
        lane = self.lanes.get(stats.lane)
        if lane is None:
            return
        lane.state, lane.epoch = stats.state, stats.epoch
        lane.reported_tokens = stats.queued_prefill_tokens + stats.running_kv_tokens
        # What was sent before the previous stats came is surely in these, as the leaders' period is far
        # longer than a message's way. Counting it twice for a period does less harm than not at all.
        lane.unsure_tokens, lane.sent_tokens = lane.sent_tokens, 0
        lane.num_reports += 1

    def sent(self, request_id: str, name: str, num_tokens: int) -> None:
        """Counts a request for a lane; a request sent again counts for the last lane only."""
        self.finished(request_id)
        lane = self.lanes[name]
        lane.sent_tokens += num_tokens
        self._open[request_id] = (lane, lane.num_reports, num_tokens)
        if len(self._open) > MAX_OPEN_REQUESTS:
            self._open.popitem(last=False)

    def finished(self, request_id: str) -> None:
        """The request is over: drops its load that no stats include yet. Ignores an unknown id."""
        if request_id not in self._open:
            return
        lane, num_reports, num_tokens = self._open.pop(request_id)
        if lane.num_reports == num_reports:
            lane.sent_tokens -= num_tokens
        elif lane.num_reports == num_reports + 1:
            lane.unsure_tokens -= num_tokens

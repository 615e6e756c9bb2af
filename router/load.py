"""The load of each lane in tokens: what its leader last reported, plus what this router has sent it since.

Tokens and not requests: a request may have 30 tokens or 30 000.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

BOUND_FACTOR = 1.25
"""A lane with more than this times the mean load is skipped (Mirrokni et al., arXiv:1608.01350)."""

SLACK_TOKENS = 512
"""See `load_bound`."""

MAX_OPEN_REQUESTS = 1 << 16
"""Requests whose load is dropped when they end early; that of older ones goes with the next stats."""


def load_bound(loads: Iterable[int], num_prompt_tokens: int) -> float:
    """Load in tokens up to which a lane takes a request: 1.25 x the mean plus a slack.

    The slack is the request's own prompt, at least SLACK_TOKENS. Without one, the only busy lane of two is always at
    twice the mean. Another lane must compute the whole prompt, so the difference in load has to be larger than that;
    below SLACK_TOKENS, a fraction of one step's batch, it is noise. The lane with the least load is never above the
    bound.
    """
    loads = list(loads)
    return BOUND_FACTOR * sum(loads) / max(len(loads), 1) + max(num_prompt_tokens, SLACK_TOKENS)


class Stats(Protocol):
    """The fields of a leader's LaneStats that count here."""

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
    """What this router knows of a lane. Without a report it counts as serving and empty."""

    state: str = "serving"
    epoch: int = 0
    reported_tokens: int = 0
    num_reports: int = 0
    sent_tokens: int = 0
    """Sent since the last report."""
    unsure_tokens: int = 0
    """Sent between the last two reports; the last may have been written before they arrived."""

    @property
    def tokens(self) -> int:
        return self.reported_tokens + self.sent_tokens + self.unsure_tokens


class LaneLoads:
    """Loads of the lanes that run now. Memory: per lane, and for at most MAX_OPEN_REQUESTS. Not thread-safe.

    A request counts as soon as it is sent, so that a burst between two reports is spread too.
    """

    def __init__(self) -> None:
        self.lanes: dict[str, LaneLoad] = {}
        # request id → lane, its num_reports when the request was sent, tokens
        self._open: OrderedDict[str, tuple[LaneLoad, int, int]] = OrderedDict()

    def set_lanes(self, names: Iterable[str]) -> None:
        """Replace the set of lanes by those that run now."""
        self.lanes = {name: self.lanes.get(name) or LaneLoad() for name in names}

    def update(self, stats: Stats) -> None:
        """Take a leader's report; one from a lane that is not in the set is ignored."""
        lane = self.lanes.get(stats.lane)
        if lane is None:
            return
        lane.state, lane.epoch = stats.state, stats.epoch
        lane.reported_tokens = stats.queued_prefill_tokens + stats.running_kv_tokens
        # A period is far longer than a message travels, so these include what was sent before the previous ones. The
        # rest may count twice for a period, which does less harm than not at all.
        lane.unsure_tokens, lane.sent_tokens = lane.sent_tokens, 0
        lane.num_reports += 1

    def sent(self, request_id: str, name: str, num_tokens: int) -> None:
        """Count a request for a lane, in place of a lane that it was sent to before."""
        self.finished(request_id)
        lane = self.lanes[name]
        lane.sent_tokens += num_tokens
        self._open[request_id] = (lane, lane.num_reports, num_tokens)
        if len(self._open) > MAX_OPEN_REQUESTS:
            self._open.popitem(last=False)

    def finished(self, request_id: str) -> None:
        """Drop the request's load that no report includes yet. An unknown id is no error."""
        if request_id not in self._open:
            return
        lane, num_reports, num_tokens = self._open.pop(request_id)
        if lane.num_reports == num_reports:
            lane.sent_tokens -= num_tokens
        elif lane.num_reports == num_reports + 1:
            lane.unsure_tokens -= num_tokens

"""The load of each lane: tokens that its leader last reported, plus those sent since."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

BOUND_FACTOR = 1.25
"""A lane with more than this times the mean load is skipped (Mirrokni et al., arXiv:1608.01350)."""

SLACK_TOKENS = 512

MAX_OPEN_REQUESTS = 1 << 16
"""Requests whose load drops when they end; that of older ones goes with later reports."""


def load_bound(loads: Sequence[int], num_prompt_tokens: int) -> float:
    """Load in tokens up to which a lane takes a request: 1.25 x the mean plus a slack.

    The slack is the prompt, which another lane has to compute, at least SLACK_TOKENS, a fraction of one step. Without
    it the only busy lane of two is always above the bound. The least loaded lane never is.
    """
    return BOUND_FACTOR * sum(loads) / max(len(loads), 1) + max(num_prompt_tokens, SLACK_TOKENS)


class Stats(Protocol):
    """The fields of LaneStats that count here."""

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
    """A lane without a report counts as serving and empty."""

    state: str = "serving"
    epoch: int = 0
    reported_tokens: int = 0
    num_reports: int = 0
    sent_tokens: int = 0
    """Sent since the last report."""
    unsure_tokens: int = 0
    """Sent between the last two reports; the last may not include them."""

    @property
    def tokens(self) -> int:
        return self.reported_tokens + self.sent_tokens + self.unsure_tokens


class LaneLoads:
    """Loads of the running lanes, with requests once they are sent. Memory: per lane, open request. Not thread-safe."""

    def __init__(self) -> None:
        self.lanes: dict[str, LaneLoad] = {}
        # request id → lane, its num_reports when the request was sent, tokens
        self._open: OrderedDict[str, tuple[LaneLoad, int, int]] = OrderedDict()

    def set_lanes(self, names: Iterable[str]) -> None:
        self.lanes = {name: self.lanes.get(name) or LaneLoad() for name in names}

    def update(self, stats: Stats) -> None:
        """Take a leader's report; one from an unknown lane is ignored."""
        lane = self.lanes.get(stats.lane)
        if lane is None:
            return
        lane.state, lane.epoch = stats.state, stats.epoch
        lane.reported_tokens = stats.queued_prefill_tokens + stats.running_kv_tokens
        # A period is far longer than a message travels, so the report includes what was sent before the previous one.
        # Later requests may count twice for a period, which does less harm than not at all.
        lane.unsure_tokens, lane.sent_tokens = lane.sent_tokens, 0
        lane.num_reports += 1

    def sent(self, request_id: str, name: str, num_tokens: int) -> None:
        """Count a request for a lane, in place of an earlier one."""
        self.finished(request_id)
        lane = self.lanes[name]
        lane.sent_tokens += num_tokens
        self._open[request_id] = (lane, lane.num_reports, num_tokens)
        if len(self._open) > MAX_OPEN_REQUESTS:
            self._open.popitem(last=False)

    def finished(self, request_id: str) -> None:
        """Drop what no report includes yet. An unknown id is no error."""
        if request_id not in self._open:
            return
        lane, num_reports, num_tokens = self._open.pop(request_id)
        if lane.num_reports == num_reports:
            lane.sent_tokens -= num_tokens
        elif lane.num_reports == num_reports + 1:
            lane.unsure_tokens -= num_tokens

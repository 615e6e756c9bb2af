"""Who is taken: more requests than lanes can begin soon are refused at once, so that those accepted finish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from stagemesh.deployments.ingress.lanes import LaneClient
from stagemesh.stages.messages.request import EngineRequest, LaneError, LaneStats

MAX_RETRY_AFTER_S = 60
RATE_WINDOW_S = 5.0
"""The rate of prompt tokens is measured over one to two of these."""


class Overloaded(LaneError):
    """The queues are full."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__("overloaded", message)
        self.retry_after_s = retry_after_s


class Place:
    """One choice, until its end or until nobody holds this any more. Its prompt counts until its first token."""

    __slots__ = ("_admission", "_num_tokens")

    def __init__(self, admission: Admission, num_tokens: int) -> None:
        self._admission: Admission | None = admission
        self._num_tokens = num_tokens

    def begin(self) -> None:
        """Its first token has come."""
        if self._admission is not None:
            self._admission.left(0, self._num_tokens)
            self._num_tokens = 0

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.left(1, self._num_tokens)
            self._admission = None

    def __del__(self) -> None:  # of an accepted request that nobody started
        self.leave()


class Admission:
    """The load as one router sees it: its own choices, or what lanes report if that is more.

    Lanes also report what other routers sent, but a moment later. Used from the router's event loop.
    """

    def __init__(
        self,
        lanes: LaneClient,
        *,
        max_requests: int,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_requests: in all, while no lane says what it has room for, as when the only one is being replaced.

        max_tokens: of prompts without a first token, per lane that reports, and for one lane while none does.
        """
        self._lanes = lanes
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._num_requests = 0
        self._num_tokens = 0
        self._rate = 0.0  # prompt tokens per second, of all lanes; 0 = unknown
        self._measured_at, self._measured_tokens = clock(), 0

    def check(self) -> None:
        """Whether the smallest request would be taken. Costs microseconds, so ask before reading a request."""
        self._check(1, 1)

    def enter(self, requests: Sequence[EngineRequest]) -> list[Place]:
        """All or none. Raises Overloaded. One that finds room and nothing queued goes however large it is."""
        num_tokens = [len(request.prompt_token_ids) for request in requests]
        self._check(len(requests), sum(num_tokens))
        self._num_requests += len(requests)
        self._num_tokens += sum(num_tokens)
        return [Place(self, number) for number in num_tokens]

    def left(self, num_requests: int, num_tokens: int) -> None:
        self._num_requests -= num_requests
        self._num_tokens -= num_tokens

    def _check(self, num_requests: int, num_tokens: int) -> None:
        stats = self._lanes.lane_stats()
        self._measure(stats)
        open_requests = max(self._num_requests, sum(lane.num_running + lane.num_waiting for lane in stats))
        room = sum(lane.room for lane in stats) or self._max_requests
        is_queue = any(lane.num_waiting for lane in stats)
        queued_tokens = max(self._num_tokens, sum(lane.queued_prefill_tokens for lane in stats))
        max_tokens = self._max_tokens * max(1, len(stats))
        if open_requests >= room or (is_queue and open_requests + num_requests > room):
            message = f"{open_requests} requests run or wait, there is room for {room}"
        elif queued_tokens and queued_tokens + num_tokens > max_tokens:
            message = f"{queued_tokens} prompt tokens are queued, at most {max_tokens} may be"
        else:
            return
        raise Overloaded(message, self._retry_after(queued_tokens))

    def _measure(self, stats: list[LaneStats]) -> None:
        now, tokens = self._clock(), sum(lane.prompt_tokens for lane in stats)
        passed = now - self._measured_at
        if passed < RATE_WINDOW_S:
            return
        # After a lull the mean would tell of the lull; when a lane goes, its sum goes with it.
        self._rate = max(0.0, tokens - self._measured_tokens) / passed if passed < 2 * RATE_WINDOW_S else 0.0
        self._measured_at, self._measured_tokens = now, tokens

    def _retry_after(self, queued_tokens: int) -> int:
        """Seconds that the queue takes to drain; 1 if that is not known."""
        if not self._rate:
            return 1
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(queued_tokens / self._rate)))

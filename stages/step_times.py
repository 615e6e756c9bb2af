"""Where the time of a lane's steps goes: inside the model, or outside it. No torch, no Ray.

With several plans in flight the time from plan to result holds more than a step's own cost: at each stage a step
waits until the step before it is through. That wait is the other step's time, so it is taken out here, stage by stage.
Times are seconds of `time.time()`: where the machines of a lane disagree about it, the sums are off by as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StepTimes:
    """Adds up the steps of one wiring, as plans leave, results arrive and stages report. Used from one thread."""

    def __init__(self, num_stages: int) -> None:
        self.model_s = 0.0
        """Inside the model, over all steps and stages reported so far."""
        self.transit_s = 0.0
        """Between a plan's sending and its result's arrival, neither inside the model nor waiting for a stage that
        had the step before; over all steps that every stage has reported."""
        self._sent_at: deque[float] = deque()
        self._arrived_at: deque[float] = deque()
        # By stage: (start, end) of the steps not added up yet, and when the step before those left the model.
        self._spans: list[deque[tuple[float, float]]] = [deque() for _ in range(num_stages)]
        self._free_at = [0.0] * num_stages

    def sent(self, at: float) -> None:
        """The next step's plan has left."""
        self._sent_at.append(at)

    def arrived(self, at: float) -> None:
        """The result of the oldest step has come."""
        self._arrived_at.append(at)

    def ran(self, stage: int, spans: Sequence[tuple[float, float]]) -> None:
        """`stage` had its next steps inside the model from, to; every step is reported once, in order."""
        self._spans[stage].extend(spans)
        self.model_s += sum(end - start for start, end in spans)
        while self._arrived_at and all(self._spans):
            self._add_up()

    def _add_up(self) -> None:
        ready_at = self._sent_at.popleft()
        for stage, reported in enumerate(self._spans):
            start, end = reported.popleft()
            self.transit_s += start - max(ready_at, self._free_at[stage])
            self._free_at[stage] = ready_at = end
        self.transit_s += self._arrived_at.popleft() - ready_at

"""How the time of a lane's steps divides into time inside the model and step overhead. No torch, no Ray.

With several steps in flight a step waits at each stage for the step before it, and scheduling costs nothing while the
stages are busy. So a step's overhead is counted from when all that it needs exists, less the waits for other steps,
stage by stage. On CUDA a stage that does not sample reports when its work was queued; the last stage's time then
includes that work. Times are seconds of `time.time()`: the sums are off by as much as the machines' clocks differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StepTimes:
    """Adds up the steps of one epoch, as plans leave and stages report. Used from one thread."""

    def __init__(self, num_stages: int) -> None:
        self._scheduled: deque[tuple[float, int]] = deque()
        # By stage: (start, end) of the steps not added up yet, and when the step before those left the model.
        self._spans: list[deque[tuple[float, float]]] = [deque() for _ in range(num_stages)]
        self._free_at = [0.0] * num_stages
        # When the latest steps left the last stage's model, the latest last.
        self._sampled_at: deque[float] = deque(maxlen=num_stages + 2)

    def scheduled(self, at: float, steps_back: int) -> None:
        """The next step: its scheduling began at `at`; it needs the tokens of the step so many back, 0 for none."""
        self._scheduled.append((at, steps_back))

    def ran(self, stage: int, spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """`stage` had its next steps inside the model during `spans`; every step is reported once, in order.

        Returns what this adds to the time inside the model, over all stages, and to the step overhead, over the steps
        that every stage has reported now.
        """
        self._spans[stage].extend(spans)
        step_overhead_s = 0.0
        while all(self._spans):
            step_overhead_s += self._overhead_s()
        return sum(end - start for start, end in spans), step_overhead_s

    def _overhead_s(self) -> float:
        """Of the oldest step, which is then forgotten."""
        ready_at, steps_back = self._scheduled.popleft()
        if 0 < steps_back <= len(self._sampled_at):
            ready_at = self._sampled_at[-steps_back]
        step_overhead_s = 0.0
        for stage, reported in enumerate(self._spans):
            start, end = reported.popleft()
            # Less than nothing where clocks disagree, or where the stage before has only queued its work.
            step_overhead_s += max(0.0, start - max(ready_at, self._free_at[stage]))
            self._free_at[stage] = ready_at = end
        self._sampled_at.append(ready_at)
        return step_overhead_s

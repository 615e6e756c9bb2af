"""Divides the time of a lane's steps into time inside the model and step overhead.

Scheduling costs nothing while the stages are busy. So a step's overhead counts from when all that it needs exists, less
its waits for the step before it at each stage. On CUDA a stage that does not sample reports when its work was queued;
the last stage's time includes that work. Times are seconds of `time.time()`, as exact as the machines' clocks agree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StepTimes:
    """The times of one epoch's steps. For one thread."""

    def __init__(self, num_stages: int) -> None:
        self._scheduled: deque[tuple[float, int]] = deque()
        # By stage: (start, end) of the steps not added up yet, and when the step before those left the model.
        self._spans: list[deque[tuple[float, float]]] = [deque() for _ in range(num_stages)]
        self._free_at = [0.0] * num_stages
        # When the latest steps left the last stage's model, the latest last.
        self._sampled_at: deque[float] = deque(maxlen=num_stages + 2)

    def scheduled(self, at: float, steps_back: int) -> None:
        """Scheduling of the next step began at `at`; it needs the tokens of the step `steps_back`, 0 for none."""
        self._scheduled.append((at, steps_back))

    def ran(self, stage: int, spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """`stage` ran its next steps inside the model during `spans`; each step is reported once, in order.

        Returns what this adds to the time inside the model and, for steps that all stages have reported, to the
        overhead.
        """
        self._spans[stage].extend(spans)
        step_overhead_s = 0.0
        while all(self._spans):
            step_overhead_s += self._overhead_s()
        return sum(end - start for start, end in spans), step_overhead_s

    def _overhead_s(self) -> float:
        """Takes out the oldest step."""
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

"""What a step costs beside the model, on timelines drawn by hand."""

from __future__ import annotations

import pytest

from stagemesh.stages.engine.step_timing import StepTimes


class Sums:
    """StepTimes, and the sums of what it returned."""

    def __init__(self, num_stages: int) -> None:
        self._times = StepTimes(num_stages)
        self.scheduled = self._times.scheduled
        self.model_s = self.step_overhead_s = 0.0

    def ran(self, stage: int, *spans: tuple[float, float]) -> None:
        model_s, step_overhead_s = self._times.ran(stage, spans)
        self.model_s += model_s
        self.step_overhead_s += step_overhead_s


def test_scheduling_and_both_ways_count_where_a_step_waits_for_them() -> None:
    times = Sums(1)
    times.scheduled(10.0, 0)
    assert times.step_overhead_s == 0, "the stage has not reported yet"
    times.ran(0, (10.5, 11.75))
    assert (times.model_s, times.step_overhead_s) == (1.25, 0.5)
    times.scheduled(12.25, 1)  # its result took 0.5, plan and scheduling 0.25
    times.ran(0, (12.5, 13.0))
    assert (times.model_s, times.step_overhead_s) == (1.75, 1.25)


def test_a_step_scheduled_ahead_costs_only_what_the_stage_stands_still() -> None:
    times = Sums(1)
    times.scheduled(0.0, 0)
    times.scheduled(0.25, 1)
    times.scheduled(1.5, 1)
    times.ran(0, (0.0, 1.0), (1.25, 2.25), (2.25, 3.25))
    assert (times.model_s, times.step_overhead_s) == (3.0, 0.25)


def test_a_step_scheduled_ahead_that_comes_late_costs_what_it_is_late() -> None:
    times = Sums(1)
    times.scheduled(0.0, 0)
    times.scheduled(1.25, 1)
    times.ran(0, (0.0, 1.0), (1.5, 2.5))
    assert times.step_overhead_s == 0.5


def test_stages_overlap() -> None:
    """Two plans over a fast and a slow stage; each of the stages' reports comes when it likes."""
    times = Sums(2)
    times.scheduled(0.0, 0)
    times.scheduled(0.0, 0)
    times.ran(1, (1.125, 3.125), (3.25, 5.25))  # behind each activation 0.125, even that which had to wait
    assert times.step_overhead_s == 0
    times.ran(0, (0.0, 1.0), (1.0, 2.0))
    assert (times.model_s, times.step_overhead_s) == (6.0, 0.25)


def test_the_wait_for_the_last_stage_to_sample_is_not_counted() -> None:
    times = Sums(2)
    times.scheduled(0.0, 0)
    times.scheduled(0.0, 1)
    times.ran(0, (0.0, 1.0), (2.125, 3.0))
    times.ran(1, (1.0, 2.0), (3.0, 4.0))
    assert times.step_overhead_s == 0.125


def test_an_idle_lane_costs_nothing() -> None:
    times = Sums(2)
    for at in (0.0, 100.0, 200.0):
        times.scheduled(at, 0)
        times.ran(0, (at, at + 1))
        times.ran(1, (at + 1, at + 2))
    assert (times.model_s, times.step_overhead_s) == (pytest.approx(6.0), pytest.approx(0.0))


def test_a_step_may_need_the_tokens_of_one_further_back_than_there_are_stages() -> None:
    times = Sums(2)
    for steps_back in (0, 0, 0, 3):
        times.scheduled(0.0, steps_back)
    times.ran(0, (0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (10.5, 11.5))
    times.ran(1, (1.0, 10.0), (10.0, 11.0), (11.0, 12.0), (12.0, 13.0))
    assert times.step_overhead_s == 0.5


def test_where_a_stage_only_queues_its_work_nothing_is_counted_twice() -> None:
    times = Sums(2)
    times.scheduled(0.0, 0)
    times.ran(0, (0.0, 5.0))
    times.ran(1, (1.0, 8.0))
    assert times.step_overhead_s == 0.0

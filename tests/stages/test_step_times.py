"""What a step costs beside the model, on timelines drawn by hand."""

from __future__ import annotations

import pytest

from stagemesh.stages.step_times import StepTimes


def test_one_step_on_one_stage() -> None:
    times = StepTimes(1)
    times.sent(10.0)
    times.arrived(12.0)
    assert times.transit_s == 0, "the stage has not reported yet"
    times.ran(0, [(10.5, 11.75)])
    assert (times.model_s, times.transit_s) == (1.25, 0.75)


def test_the_wait_for_the_step_before_is_not_counted() -> None:
    times = StepTimes(1)
    for _ in range(3):
        times.sent(0.0)
    times.ran(0, [(0.0, 1.0), (1.25, 2.25)])
    times.arrived(1.0)
    times.arrived(2.25)
    times.arrived(3.5)
    times.ran(0, [(2.25, 3.25)])
    # Between the first two steps the stage was idle for 0.25, and the last result took 0.25 to arrive.
    assert (times.model_s, times.transit_s) == (3.0, 0.5)


def test_stages_overlap() -> None:
    """Two plans in flight over a fast and a slow stage; each of the stages' reports comes when it likes."""
    times = StepTimes(2)
    times.sent(0.0)
    times.sent(0.0)
    times.ran(1, [(1.125, 3.125), (3.25, 5.25)])  # behind each activation 0.125, even that which had to wait
    times.arrived(3.125)
    times.arrived(5.25)
    assert times.transit_s == 0
    times.ran(0, [(0.0, 1.0), (1.0, 2.0)])
    assert (times.model_s, times.transit_s) == (6.0, 0.25)


def test_an_idle_lane_costs_nothing() -> None:
    times = StepTimes(2)
    for at in (0.0, 100.0):
        times.sent(at)
        times.ran(0, [(at, at + 1)])
        times.ran(1, [(at + 1, at + 2)])
        times.arrived(at + 2)
    times.sent(200.0)
    times.ran(0, [(200.0, 201.0)])
    times.ran(1, [(201.0, 202.0)])
    times.arrived(202.0)
    times.ran(0, [])
    assert (times.model_s, times.transit_s) == (pytest.approx(6.0), pytest.approx(0.0))

"""When running sequences end, and what room a lane reports for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.forecast import SOON_S, Forecast
from stagemesh.stages.engine.scheduler import Scheduler


def sequence(num_output: int, max_tokens: int, *, pooling: bool = False) -> Any:
    return SimpleNamespace(
        num_output_tokens=num_output,
        num_tokens=10 + num_output,
        max_num_tokens=10 + max_tokens,
        params=SimpleNamespace(pooling=object() if pooling else None),
    )


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def measured(clock: Clock, token_s: float, running: list[Any]) -> Forecast:
    """A forecast that has seen each of `running` take a token every `token_s`."""
    forecast = Forecast(clock)
    clock.now += 100 * token_s
    forecast.num_ending(running, 100 * len(running))
    return forecast


def test_nothing_ends_before_the_pace_is_known(clock: Clock) -> None:
    forecast = Forecast(clock)
    assert forecast.num_ending([sequence(9, 10)], 0) == 0
    assert forecast.num_ending([], 0) == 0


def test_a_sequence_ends_soon_when_its_last_tokens_come_soon(clock: Clock) -> None:
    soon = int(SOON_S / 0.05)
    running = [sequence(100 - left, 100) for left in (1, soon, soon + 1, 90)]
    assert measured(clock, 0.05, running).num_ending(running, 400) == 2


def test_answers_end_where_most_have_ended(clock: Clock) -> None:
    running = [sequence(done, 10_000) for done in (10, 35, 39, 50)]
    forecast = measured(clock, 0.05, running)
    assert forecast.num_ending(running, 400) == 0
    for _ in range(5):
        forecast.ended(40)
    assert forecast.num_ending(running, 400) == 2  # one that is longer than most may go on for as long again
    for _ in range(100):
        forecast.ended(4)
    assert forecast.num_ending(running, 400) == 4


def test_prompts_that_only_give_a_vector_end_at_once(clock: Clock) -> None:
    assert Forecast(clock).num_ending([sequence(0, 1, pooling=True)], 0) == 1


def test_a_stalled_lane_expects_no_end(clock: Clock) -> None:
    running = [sequence(99, 100)]
    forecast = measured(clock, 0.01, running)
    assert forecast.num_ending(running, 100) == 1
    clock.now += 10
    assert forecast.num_ending(running, 100) == 0


def scheduler(num_blocks: int, **limits: Any) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks, block_size=4, max_num_seqs=3, max_num_batched_tokens=64, max_model_len=64, **limits
    )


def add(scheduler: Scheduler, *names: str) -> None:
    for name in names:
        scheduler.add_request(name, [1] * 12, SamplingParams(max_tokens=4, seed=0))


def test_room_is_what_runs_at_once_and_what_may_wait() -> None:
    assert scheduler(64).stats().room == 3
    assert scheduler(64, max_queued_requests=7).stats().room == 10


def test_a_lane_without_blocks_has_room_for_what_it_runs() -> None:
    lane = scheduler(6)  # each sequence needs four of them
    add(lane, "a", "b")
    lane.schedule()
    assert (lane.stats().num_running, lane.stats().num_waiting, lane.stats().room) == (1, 1, 1)
    lane.abort_request("b")
    assert lane.stats().room == 3

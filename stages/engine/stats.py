"""What a lane reports, summed up over its life, and when the next report is due."""

from __future__ import annotations

import time
from itertools import chain
from statistics import fmean
from typing import NamedTuple

from stagemesh.stages.engine.step_timing import StepTimes
from stagemesh.stages.messages.request import LaneStats
from stagemesh.stages.messages.step import WorkerStats

MIN_PERIOD_S = 0.1
HEARTBEAT_S = 1.0
"""Longest time between reports, so that a missing one means something."""


class SchedulerStats(NamedTuple):
    num_running: int = 0
    num_waiting: int = 0
    room: int = 0
    queued_prefill_tokens: int = 0
    running_kv_tokens: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class StatsCollector:
    """Makes the LaneStats of one lane, in the engine's thread."""

    def __init__(self, lane: str, block_size: int) -> None:
        self._lane = lane
        self._block_size = block_size
        self.state = "starting"
        self.epoch = 0
        self._num_steps = 0
        self.schedule_s = 0.0
        self._step_overhead_s = 0.0
        self._model_s = 0.0
        self._expert_tokens: list[int] = []
        self._expert_imbalance: dict[int, list[float]] = {}  # by stage
        self._reported_at = 0.0
        self.has_news = True
        """The next report should not wait for the heartbeat."""

    @property
    def due_at(self) -> float:
        """`time.monotonic()` of the next report."""
        return self._reported_at + (MIN_PERIOD_S if self.has_news else HEARTBEAT_S)

    def set_state(self, state: str) -> None:
        self.state = state
        self.has_news = True

    def add_step(self, schedule_s: float) -> None:
        """schedule_s: time spent on the step's result."""
        self._num_steps += 1
        self.schedule_s += schedule_s
        self.has_news = True

    def add_worker(self, stats: WorkerStats, step_times: StepTimes) -> None:
        """step_times: of the epoch in which the stage ran."""
        model_s, step_overhead_s = step_times.ran(stats.stage, stats.spans)
        self._model_s += model_s
        self._step_overhead_s += step_overhead_s
        if stats.expert_tokens:
            before = self._expert_tokens or [0] * len(stats.expert_tokens)
            self._expert_tokens = [a + b for a, b in zip(before, stats.expert_tokens, strict=True)]
            self._expert_imbalance[stats.stage] = stats.expert_imbalance

    def reported(self) -> None:
        self._reported_at, self.has_news = time.monotonic(), False

    def make(self, scheduler: SchedulerStats) -> LaneStats:
        imbalance = list(chain.from_iterable(self._expert_imbalance.values()))
        return LaneStats(
            lane=self._lane,
            state=self.state,
            epoch=self.epoch,
            num_steps=self._num_steps,
            schedule_s=self.schedule_s,
            step_overhead_s=self._step_overhead_s,
            model_s=self._model_s,
            block_size=self._block_size,
            expert_tokens=self._expert_tokens,
            expert_imbalance=fmean(imbalance) if imbalance else 0.0,
            **scheduler._asdict(),
        )

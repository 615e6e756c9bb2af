"""One wiring of a lane: the channel to its workers and the steps in flight."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stagemesh.stages.engine.lane import StepTimeout
from stagemesh.stages.engine.step import ScheduledStep
from stagemesh.stages.engine.step_timing import StepTimes
from stagemesh.stages.messages.channel import ChannelClosed, LeaderChannel
from stagemesh.stages.messages.step import StepFailure, StepResult, StopRun, WorkerStats

logger = logging.getLogger(__name__)


@dataclass
class _InFlight:
    step: ScheduledStep
    number: int
    due_from: float
    """`time.monotonic()` when it was sent, or became the oldest."""


class StepRaised(RuntimeError):
    """The work of `step` raised, here or in a rank."""

    def __init__(self, step: ScheduledStep, reason: str) -> None:
        self.step = step
        super().__init__(reason)


class Epoch:
    """From `Engine.attach` until a step fails or the next wiring. Owns `channel`."""

    def __init__(self, number: int, channel: LeaderChannel, num_stages: int, step_timeout_s: float) -> None:
        self.number = number
        self.channel = channel
        self.step_times = StepTimes(num_stages)
        self._step_timeout_s = step_timeout_s
        self._next_step = 0
        self._in_flight: deque[_InFlight] = deque()

    def send(self, step: ScheduledStep, scheduled_at: float) -> None:
        """Send the step's plan. scheduled_at: `time.time()` when its scheduling began."""
        self.channel.send(step.to_plan(self.number, self._next_step))
        steps_back = step.placeholder_steps_back
        if not steps_back and step.has_decodes:  # its tokens came, at the latest, with the last result
            steps_back = len(self._in_flight) + 1
        self.step_times.scheduled(scheduled_at, steps_back)
        self._in_flight.append(_InFlight(step, self._next_step, time.monotonic()))
        self._next_step += 1

    def receive(self) -> list[StepResult | WorkerStats]:
        """What the workers have sent in this epoch; never waits. StepRaised if a rank failed."""
        messages: list[StepResult | WorkerStats] = []
        for message in self.channel.receive():
            if message.epoch != self.number:
                continue
            if isinstance(message, StepFailure):
                for sent in self._in_flight:
                    if sent.number == message.step:
                        raise StepRaised(sent.step, f"stage {message.stage} rank {message.tp_rank}: {message.error}")
            else:
                messages.append(message)
        return messages

    def finish_step(self, result: StepResult) -> ScheduledStep:
        """The oldest step in flight; RuntimeError if `result` is of another."""
        oldest = self._in_flight.popleft()
        if oldest.number != result.step:
            raise RuntimeError(f"result of step {result.step} came while step {oldest.number} was due")
        if self._in_flight:
            self._in_flight[0].due_from = time.monotonic()
        return oldest.step

    @property
    def deadline(self) -> float | None:
        """`time.monotonic()` when the oldest step in flight is overdue."""
        return self._in_flight[0].due_from + self._step_timeout_s if self._in_flight else None

    def check_deadline(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            number = self._in_flight[0].number
            raise StepTimeout(f"step {number} had no result within step_timeout_s={self._step_timeout_s:g}")

    @property
    def oldest_step(self) -> ScheduledStep | None:
        """The step in flight whose result is due."""
        return self._in_flight[0].step if self._in_flight else None

    def close(self) -> None:
        """Stop the workers, free the sockets. ChannelClosed if a worker is out of reach."""
        try:
            self.channel.send(StopRun(self.number))
        finally:
            self.channel.close()


@contextmanager
def blaming(step: ScheduledStep) -> Iterator[None]:
    """What is raised within is the fault of `step`: StepRaised. A lost channel is not."""
    try:
        yield
    except ChannelClosed:
        raise
    except Exception as error:
        logger.exception("a step raised")
        raise StepRaised(step, f"{type(error).__name__}: {error}") from error

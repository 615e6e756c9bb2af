"""The engine loop of a lane: one thread that schedules, sends plans, takes results in and hands tokens out.

Free of Ray and of torch. The scheduler and the sockets belong to this thread; everybody else asks through
`call`, which runs a function between two steps. A thread, not asyncio: a step must not wait for whatever
else the process's event loop is doing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any, Protocol, TypeVar

import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.stages.engine.grammar import GrammarFactory
from stagemesh.stages.engine.lane import StepTimeout
from stagemesh.stages.engine.scheduler import COUNTS, Scheduler, SequenceUpdate
from stagemesh.stages.engine.step import ScheduledStep
from stagemesh.stages.engine.step_timing import StepTimes
from stagemesh.stages.messages.channel import ChannelClosed, LeaderChannel
from stagemesh.stages.messages.request import EngineRequest, LaneStats, RequestSummary, TokenDelta
from stagemesh.stages.messages.step import StepResult, StopRun, WorkerStats

logger = logging.getLogger(__name__)

SHUT_DOWN = "the lane was shut down"
STATS_MIN_PERIOD_S = 0.1
STATS_HEARTBEAT_S = 1.0
"""Stats go out at least this often, so that their absence means something."""

Result = TypeVar("Result")


class TokenSink(Protocol):
    """Where tokens go. Called in the engine's thread, never waits."""

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        """Hand `deltas` to whoever listens at `reply_to`; False when nobody reads there any more."""

    def publish(self, stats: LaneStats) -> None:
        """Tell everybody how the lane is."""


@dataclass
class _Request:
    reply_to: str
    done: Future[RequestSummary]
    num_sent: int = 0


@dataclass
class _InFlight:
    step: ScheduledStep
    number: int
    due_from: float
    """When it was sent, or when it became the oldest."""


@dataclass
class _Clocks:
    """Sums over the life of the lane, as LaneStats explains them."""

    num_steps: int = 0
    schedule_s: float = 0.0
    step_overhead_s: float = 0.0
    model_s: float = 0.0


@dataclass
class _Wired:
    """The lane as it is wired now."""

    channel: LeaderChannel
    epoch: int
    times: StepTimes
    next_step: int = 0
    in_flight: deque[_InFlight] = field(default_factory=deque)


class Engine:
    """Runs one lane. `on_failure(epoch, error)` is called from the engine's thread when a step fails."""

    def __init__(
        self, config: EngineConfig, lane: str, sink: TokenSink, on_failure: Callable[[int, Exception], None]
    ) -> None:
        self._config = config
        self._lane = lane
        self._sink = sink
        self._on_failure = on_failure
        self._grammars = GrammarFactory(config.local_model_path(), config.model.eos_token_ids, config.model.vocab_size)
        self._scheduler: Scheduler | None = None
        self._wired: _Wired | None = None
        self._requests: dict[str, _Request] = {}
        self._updates: list[SequenceUpdate] = []
        """What the steps brought and nobody has been told yet."""
        self._state = "starting"
        self._epoch = 0
        self._clocks = _Clocks()
        self._expert_tokens: list[int] = []
        self._expert_imbalance: dict[int, list[float]] = {}  # by stage
        self._commands: deque[Callable[[], None]] = deque()
        self._wake: int | None = os.eventfd(0, os.EFD_NONBLOCK)
        self._closed = False
        # Held to accept a command, to close and to free `_wake`: what is accepted is also run.
        self._lock = threading.Lock()
        self._stats_at = 0.0
        self._stats_due = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for other threads -------------------------------------------------------------------------------

    def call(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run `function(*args)` in the engine's thread between two steps.

        The future cannot be cancelled: who waits may give up, what was asked is done all the same.
        """
        future = _started()

        def command() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._closed:
                future.set_exception(RuntimeError(SHUT_DOWN))
            else:
                self._commands.append(command)
                self._wake_up()
        return future

    def generate(self, request: EngineRequest) -> Future[RequestSummary]:
        """Start a request; the future ends with it (ConfigError if it is refused)."""
        done = _started()
        grammar = None
        if request.params.structured_outputs is not None:
            try:
                # In the caller's thread: a large one takes a while, and running answers must not wait for it.
                grammar = self._grammars.make(request.params.structured_outputs)
            except ConfigError as error:
                done.set_exception(error)
                return done

        def add() -> None:
            if self._scheduler is None:
                raise ConfigError("", None, "the lane is not wired yet")
            self._scheduler.add_request(request.request_id, request.prompt_token_ids, request.params, grammar)
            self._requests[request.request_id] = _Request(request.reply_to, done)
            self._stats_due = True

        def added(future: Future[None]) -> None:
            if (error := future.exception()) is not None:
                done.set_exception(error)

        self.call(add).add_done_callback(added)
        return done

    def abort(self, request_id: str) -> Future[None]:
        """End a request nobody waits for any more; its blocks are free before the next step."""
        return self.call(self._abort, request_id)

    def attach(self, channel: LeaderChannel, epoch: int, num_blocks: int) -> Future[None]:
        """The lane is wired (again): run on `channel`, which the engine owns from now on."""
        return self.call(self._attach, channel, epoch, num_blocks)

    def detach(self, state: str) -> Future[None]:
        """The wiring is gone. Running requests wait, and are computed again after the next `attach`."""
        return self.call(self._detach, state)

    def set_state(self, state: str) -> Future[None]:
        return self.call(self._set_state, state)

    def stats(self) -> Future[LaneStats]:
        return self.call(self._make_stats)

    def close(self) -> None:
        """End the thread; running requests fail. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._wake_up()
        self._thread.join(timeout=10)
        with self._lock:
            if self._wake is not None and not self._thread.is_alive():
                os.close(self._wake)
                self._wake = None

    def _wake_up(self) -> None:
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    # -- in the engine's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._wait()
                self._run_commands()
                self._fail_epoch_on_error(self._receive_results)
                self._fail_epoch_on_error(self._check_deadline)
                self._fail_epoch_on_error(self._schedule_steps)
                self._fail_epoch_on_error(self._emit_outputs)  # behind the next plan, which the workers wait for
                self._publish()
        finally:
            with self._lock:
                self._closed = True  # also when an error has ended the thread: nobody may wait for it
            self._run_commands()
            for request in self._requests.values():
                request.done.set_exception(RuntimeError(SHUT_DOWN))
            self._detach("stopped")

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _fail_epoch_on_error(self, part: Callable[[], None]) -> None:
        """A failure inside a step is a failure of this wiring, not of the thread."""
        try:
            part()
        except Exception as error:
            if not isinstance(error, (ChannelClosed, StepTimeout)):
                logger.exception("lane %s: a step failed", self._lane)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        epoch = self._epoch
        self._detach("healing")
        self._on_failure(epoch, error)

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        if self._wired is not None:
            poller.register(self._wired.channel.results, zmq.POLLIN)
        period = STATS_MIN_PERIOD_S if self._stats_due else STATS_HEARTBEAT_S
        until = self._stats_at + period
        if self._wired is not None and self._wired.in_flight:
            until = min(until, self._due_at(self._wired.in_flight[0]))
        left = max(0.0, until - time.monotonic())
        for handle, _ in poller.poll(int(1000 * left) + 1):
            if handle == self._wake:
                os.eventfd_read(handle)

    def _schedule_steps(self) -> None:
        wired, scheduler = self._wired, self._scheduler
        if wired is None or scheduler is None:
            return
        while True:
            started, started_at = time.monotonic(), time.time()
            step = scheduler.schedule()
            if step is None:
                return
            wired.channel.send(step.to_plan(wired.epoch, wired.next_step))
            needs = step.placeholder_steps_back
            if not needs and step.has_decodes:  # for tokens that came, at the latest, with the last result
                needs = len(wired.in_flight) + 1
            wired.times.planned(started_at, needs)
            now = time.monotonic()
            wired.in_flight.append(_InFlight(step, wired.next_step, now))
            wired.next_step += 1
            self._clocks.schedule_s += now - started

    def _receive_results(self) -> None:
        wired = self._wired
        if wired is None:
            return
        for message in wired.channel.receive():
            if message.epoch != wired.epoch:
                continue
            if isinstance(message, StepResult):
                self._finish_step(wired, message)
            else:
                self._take_stats(wired, message)

    def _finish_step(self, wired: _Wired, result: StepResult) -> None:
        assert self._scheduler is not None
        started = time.monotonic()
        flight = wired.in_flight.popleft()
        if flight.number != result.step:
            raise RuntimeError(f"result of step {result.step} came while step {flight.number} was due")
        if wired.in_flight:
            wired.in_flight[0].due_from = started
        self._updates += self._scheduler.process_result(
            flight.step, result.token_ids, result.logprobs, result.prompt_logprobs, result.pooled
        )
        self._stats_due = True
        self._clocks.num_steps += 1
        self._clocks.schedule_s += time.monotonic() - started

    def _take_stats(self, wired: _Wired, stats: WorkerStats) -> None:
        model_s, step_overhead_s = wired.times.ran(stats.stage, stats.spans)
        self._clocks.model_s += model_s
        self._clocks.step_overhead_s += step_overhead_s
        if stats.expert_tokens:
            before = self._expert_tokens or [0] * len(stats.expert_tokens)
            self._expert_tokens = [a + b for a, b in zip(before, stats.expert_tokens, strict=True)]
            self._expert_imbalance[stats.stage] = stats.expert_imbalance

    def _emit_outputs(self) -> None:
        updates, self._updates = self._updates, []
        by_router: dict[str, list[TokenDelta]] = {}
        for update in updates:
            request = self._requests.get(update.request_id)
            if request is None:
                continue
            by_router.setdefault(request.reply_to, []).append(
                TokenDelta(
                    update.request_id,
                    request.num_sent,
                    update.token_ids,
                    update.finish_reason,
                    update.stop_token_id,
                    update.num_cached_tokens,
                    error=update.error,
                    logprobs=update.logprobs,
                    prompt_logprobs=update.prompt_logprobs,
                    embedding=update.embedding,
                )
            )
            request.num_sent += len(update.token_ids)
        for reply_to, deltas in by_router.items():
            if self._sink.emit(reply_to, deltas):
                continue
            for delta in deltas:  # the router is gone, and with it whoever waited
                self._abort(delta.request_id)
        for update in updates:
            if update.finish_reason is not None:
                self._finish(update.request_id, update.finish_reason)

    def _finish(self, request_id: str, reason: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.done.set_result(RequestSummary(request_id, request.num_sent, reason))

    def _abort(self, request_id: str) -> None:
        if request_id in self._requests and self._scheduler is not None:
            self._scheduler.abort_request(request_id)
            self._finish(request_id, "abort")
            self._stats_due = True

    def _check_deadline(self) -> None:
        if self._wired is None or not self._wired.in_flight:
            return
        oldest = self._wired.in_flight[0]
        if time.monotonic() > self._due_at(oldest):
            limit = self._config.step_timeout_s
            raise StepTimeout(f"step {oldest.number} had no result within step_timeout_s={limit:g}")

    def _due_at(self, flight: _InFlight) -> float:
        return flight.due_from + self._config.step_timeout_s

    def _attach(self, channel: LeaderChannel, epoch: int, num_blocks: int) -> None:
        if self._scheduler is None:
            config = self._config
            self._scheduler = Scheduler(
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                num_micro_batches=config.plan.pp_size,
                eos_token_ids=config.model.eos_token_ids,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        self._wired = _Wired(channel, epoch, StepTimes(self._config.plan.pp_size))
        self._epoch = epoch
        self._set_state("serving")
        self._stats_due = True

    def _detach(self, state: str) -> None:
        self._set_state(state)
        if self._wired is None:
            return
        wired, self._wired = self._wired, None
        try:
            wired.channel.send(StopRun(wired.epoch))
        except ChannelClosed as error:
            logger.info("lane %s: %s", self._lane, error)
        wired.channel.close()
        if self._scheduler is not None:
            self._scheduler.preempt_all()

    def _set_state(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self._stats_due = True

    def _publish(self) -> None:
        period = STATS_MIN_PERIOD_S if self._stats_due else STATS_HEARTBEAT_S
        now = time.monotonic()
        if now - self._stats_at >= period:
            self._stats_at, self._stats_due = now, False
            self._sink.publish(self._make_stats())

    def _make_stats(self) -> LaneStats:
        counts = dict.fromkeys(COUNTS, 0) if self._scheduler is None else self._scheduler.counts()
        imbalance = list(chain.from_iterable(self._expert_imbalance.values()))
        return LaneStats(
            lane=self._lane,
            state=self._state,
            epoch=self._epoch,
            block_size=self._config.block_size,
            expert_tokens=self._expert_tokens,
            expert_imbalance=fmean(imbalance) if imbalance else 0.0,
            **vars(self._clocks),
            **counts,
        )


def _started() -> Future[Any]:
    """A future that cannot be cancelled."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future

"""The engine loop of a lane: receive results, schedule steps, send their plans, emit outputs.

It has its own thread, so that no step waits for the process's event loop. Other threads reach scheduler and sockets
only by `Engine.call`, which runs a function between two turns of the loop.

A lane is alive while it completes steps: it serves from the first result of an epoch on, and an idle one generates a
token now and then (`CANARY_PERIOD_S`), whose step has the deadline of any other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.epoch import Epoch, StepRaised, blaming
from stagemesh.stages.engine.grammar import Grammar, GrammarFactory
from stagemesh.stages.engine.lane import StepTimeout
from stagemesh.stages.engine.scheduler import Scheduler
from stagemesh.stages.engine.stats import SchedulerStats, StatsCollector
from stagemesh.stages.messages.channel import ChannelClosed, LeaderChannel
from stagemesh.stages.messages.request import EngineRequest, LaneStats, RequestSummary, TokenDelta
from stagemesh.stages.messages.step import WorkerStats

logger = logging.getLogger(__name__)

SHUT_DOWN = "the lane was shut down"
CANARY_PERIOD_S = 10.0
"""An idle lane generates a token so long after its last step."""
CANARY_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, seed=0, ignore_eos=True)

Result = TypeVar("Result")


class TokenSink(Protocol):
    """Where tokens go. Called in the engine's thread; never waits."""

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        """Hand `deltas` to the reader at `reply_to`; False when it is gone."""

    def publish(self, stats: LaneStats) -> None: ...

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        """Those of these readers that are gone. Asked a few times a second."""


@dataclass
class _Request:
    reply_to: str
    done: Future[RequestSummary]


class Engine:
    """Runs one lane. Calls `on_failure(epoch, error)` in its thread when a step fails."""

    def __init__(
        self, config: EngineConfig, lane: str, sink: TokenSink, on_failure: Callable[[int, Exception], None]
    ) -> None:
        self._config = config
        self._lane = lane
        self._sink = sink
        self._on_failure = on_failure
        self._grammars = GrammarFactory(config.local_model_path(), config.model.eos_token_ids, config.model.vocab_size)
        self._scheduler: Scheduler | None = None
        self._epoch: Epoch | None = None
        self._requests: dict[str, _Request] = {}
        self._outputs: list[TokenDelta] = []
        self._last_result_at = 0.0
        self._stats = StatsCollector(lane, config.block_size)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake: int | None = os.eventfd(0, os.EFD_NONBLOCK)
        self._closed = False
        # Held to accept a command, to close and to free `_wake`: every accepted command runs.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- the loop ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._wait()
                self._run_commands()
                self._fail_epoch_on_error(self._step)
                self._publish_stats()
        finally:
            self._end()

    def _step(self) -> None:
        epoch, scheduler = self._epoch, self._scheduler
        if epoch is None or scheduler is None:
            return
        try:
            # First, because a result makes room for the next step, and the workers wait for its plan.
            self._receive_results(epoch, scheduler)
            epoch.check_deadline()
            self._add_canary(scheduler)
            self._schedule_steps(epoch, scheduler)
        finally:
            self._emit_outputs()  # also what came before a failure

    def _receive_results(self, epoch: Epoch, scheduler: Scheduler) -> None:
        for message in epoch.receive():
            if isinstance(message, WorkerStats):
                self._stats.add_worker(message, epoch.step_times)
                continue
            started = time.monotonic()
            step = epoch.finish_step(message)
            with blaming(step):
                self._outputs += scheduler.process_result(step, message)
            self._last_result_at = time.monotonic()
            self._stats.add_step(self._last_result_at - started)
            if self._stats.state != "serving":
                self._stats.set_state("serving")

    def _add_canary(self, scheduler: Scheduler) -> None:
        if not scheduler.has_work and time.monotonic() >= self._canary_due_at:
            self._add(EngineRequest(f"canary-{time.monotonic_ns()}", [0], CANARY_PARAMS), None, _started())

    @property
    def _canary_due_at(self) -> float:
        """`time.monotonic()`; now where this epoch has not completed a step yet."""
        return self._last_result_at + CANARY_PERIOD_S if self._stats.state == "serving" else 0.0

    def _schedule_steps(self, epoch: Epoch, scheduler: Scheduler) -> None:
        while True:
            started, started_at = time.monotonic(), time.time()
            step = scheduler.schedule()
            if step is None:
                return
            with blaming(step):
                epoch.send(step, started_at)
            self._stats.schedule_s += time.monotonic() - started

    def _emit_outputs(self) -> None:
        outputs, self._outputs = self._outputs, []
        by_router: dict[str, list[TokenDelta]] = {}
        for delta in outputs:
            by_router.setdefault(self._requests[delta.request_id].reply_to, []).append(delta)
        by_router.pop("", None)  # the leader's own requests
        for reply_to, deltas in by_router.items():
            if not self._sink.emit(reply_to, deltas):
                for delta in deltas:  # the router is gone, and its clients with it
                    self._abort(delta.request_id)
        for delta in outputs:
            if delta.finish_reason is not None:
                self._finish(delta.request_id, delta.offset + len(delta.token_ids), delta.finish_reason)

    # -- beside the loop ---------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait for a message, a command, the next report or a deadline."""
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        until = self._stats.due_at
        if self._epoch is not None:
            poller.register(self._epoch.channel.results, zmq.POLLIN)
            until = min(until, self._epoch.deadline or self._canary_due_at)
        timeout_s = max(0.0, until - time.monotonic())
        for handle, _ in poller.poll(int(1000 * timeout_s) + 1):
            if handle == self._wake:
                os.eventfd_read(handle)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _fail_epoch_on_error(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            if not isinstance(error, (ChannelClosed, StepTimeout)):
                logger.exception("lane %s: a step failed", self._lane)
            epoch = self._stats.epoch
            self._detach("healing", error)
            self._on_failure(epoch, error)

    def _publish_stats(self) -> None:
        if time.monotonic() >= self._stats.due_at:
            self._stats.reported()
            self._sink.publish(self._make_stats())
            self._abort_orphans()

    def _abort_orphans(self) -> None:
        """End the requests whose reader is gone."""
        gone = self._sink.gone_readers({request.reply_to for request in self._requests.values()} - {""})
        for request_id in [name for name, request in self._requests.items() if request.reply_to in gone]:
            logger.warning("lane %s: request %s ends: its router is gone", self._lane, request_id)
            self._abort(request_id)

    def _make_stats(self) -> LaneStats:
        return self._stats.make(SchedulerStats() if self._scheduler is None else self._scheduler.stats())

    def _end(self) -> None:
        """The thread ends, possibly by an error: no future may stay open."""
        with self._lock:
            self._closed = True
        self._run_commands()
        for request in self._requests.values():
            request.done.set_exception(RuntimeError(SHUT_DOWN))
        self._detach("stopped")

    # -- requests, from any thread -----------------------------------------------------------------------

    def make_grammar(self, params: SamplingParams) -> Grammar | None:
        """The grammar of a request's answers, if they have a form. From any thread; a large one takes seconds.

        Raises ConfigError."""
        if params.structured_outputs is None:
            return None
        return self._grammars.make(params.structured_outputs, params.structured_outputs_after)

    def generate(self, request: EngineRequest, grammar: Grammar | None = None) -> Future[RequestSummary]:
        """Start a request; the future ends with it, by ConfigError if it is refused.

        grammar: from `make_grammar`; made here, in the caller's thread, if it is missing.
        """
        done = _started()
        try:
            grammar = grammar or self.make_grammar(request.params)
        except ConfigError as error:
            done.set_exception(error)
            return done

        def added(future: Future[None]) -> None:
            if (error := future.exception()) is not None:
                done.set_exception(error)

        self.call(self._add, request, grammar, done).add_done_callback(added)
        return done

    def _add(self, request: EngineRequest, grammar: Grammar | None, done: Future[RequestSummary]) -> None:
        if self._scheduler is None:
            raise ConfigError("", None, "the lane is not wired yet")
        self._scheduler.add_request(
            request.request_id,
            request.prompt_token_ids,
            request.params,
            grammar,
            output_token_ids=request.output_token_ids,
            attempt=request.attempt,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        if request.request_id in self._requests:  # an older attempt, which the scheduler has just ended
            self._finish(request.request_id, 0, "abort")
        self._requests[request.request_id] = _Request(request.reply_to, done)
        self._stats.has_news = True

    def abort(self, request_id: str) -> Future[None]:
        """End a request; its blocks are free before the next step."""
        return self.call(self._abort, request_id)

    def check_health(self) -> None:
        """Raises RuntimeError if the loop has ended. From any thread."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine of lane {self._lane} has ended")

    @property
    def is_serving(self) -> bool:
        """A step of this epoch has been completed, and none has failed. From any thread."""
        return self._stats.state == "serving"

    @property
    def last_result_at(self) -> float:
        """`time.monotonic()` of the last completed step; 0 before the first. From any thread."""
        return self._last_result_at

    def stats(self) -> Future[LaneStats]:
        return self.call(self._make_stats)

    def reset_prefix_cache(self) -> Future[bool]:
        return self.call(lambda: self._scheduler is None or self._scheduler.reset_prefix_cache())

    def _abort(self, request_id: str) -> None:
        sequence = None if self._scheduler is None else self._scheduler.abort_request(request_id)
        if sequence is not None:
            self._finish(request_id, sequence.num_output_tokens, "abort")
            self._stats.has_news = True

    def _finish(self, request_id: str, num_tokens: int, reason: str) -> None:
        self._requests.pop(request_id).done.set_result(RequestSummary(request_id, num_tokens, reason))

    # -- the life of the lane, from any thread -----------------------------------------------------------

    def attach(self, channel: LeaderChannel, epoch: int, num_blocks: int) -> Future[None]:
        """Serve on `channel`, which the engine then owns."""
        return self.call(self._attach, channel, epoch, num_blocks)

    def detach(self, state: str) -> Future[None]:
        """Stop serving. Running requests are computed again after the next `attach`."""
        return self.call(self._detach, state)

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

    def call(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Run `function(*args)` in the engine's thread, even if the caller stops waiting."""
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

    def _wake_up(self) -> None:
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)

    def _attach(self, channel: LeaderChannel, epoch: int, num_blocks: int) -> None:
        config = self._config
        self._detach("healing")
        if self._scheduler is None:
            self._scheduler = Scheduler(
                num_blocks=num_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                num_micro_batches=config.plan.pp_size,
                eos_token_ids=config.model.eos_token_ids,
                enable_prefix_caching=config.enable_prefix_caching,
                max_queued_requests=config.max_queued_requests,
            )
        self._epoch = Epoch(epoch, channel, config.plan.pp_size, config.step_timeout_s)
        self._stats.epoch = epoch

    def _detach(self, state: str, error: Exception | None = None) -> None:
        """error: by which a step failed, if one did."""
        self._stats.set_state(state)
        if self._epoch is None:
            return
        epoch, self._epoch = self._epoch, None
        try:
            if error is None:
                epoch.receive()  # a rank's failure may have come before the news that it left its loop
        except StepRaised as raised:
            error = raised
        try:
            epoch.close()
        except ChannelClosed as closed:
            logger.info("lane %s: %s", self._lane, closed)
        if self._scheduler is not None:
            self._scheduler.preempt_all()
            self._blame(self._scheduler, epoch, error)
            self._emit_outputs()

    def _blame(self, scheduler: Scheduler, epoch: Epoch, error: Exception | None) -> None:
        """A lost rank or peer blames no request; a step that raised, or hung, blames its own."""
        if isinstance(error, StepRaised):
            self._outputs += scheduler.blame(error.step, str(error))
        elif isinstance(error, StepTimeout) and epoch.oldest_step is not None:
            self._outputs += scheduler.blame(epoch.oldest_step, str(error), is_hang=True)


def _started() -> Future[Any]:
    """A future that cannot be cancelled."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future

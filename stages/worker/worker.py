"""One rank of one stage: wired into a lane for an epoch at a time, running step plans until told to stop.

Life: `load` and `profile` once, then for every epoch `open` → `connect` → `run`. These three may be called from any
thread: what comes in another order, twice, or from an older epoch raises RuntimeError and changes nothing. Sockets and
process groups are closed by the call that uses them, or while none does.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.layers.tensor_parallel import PeerLost
from stagemesh.stages.messages.channel import WorkerChannel
from stagemesh.stages.messages.step import SampledTokens, StepFailure, StepPlan, StepResult, StopRun, WorkerStats
from stagemesh.stages.messages.wiring import Endpoints, Progress, Wiring
from stagemesh.stages.worker.model_runner import ModelRunner
from stagemesh.stages.worker.process_groups import ProcessGroups
from stagemesh.stages.worker.transport import ActivationTransport, DistTransport

POLL_MS = 1000
"""An idle worker waits this long at a time: it then sends the stats of its last steps."""
STATS_PERIOD_S = 1.0
JOIN_TIMEOUT_S = 5.0
"""For what runs in an epoch to end once it is told to stop."""
ABORT_AFTER_S = 1.0
"""On CUDA, collectives that have not ended this long after `stop` are aborted."""

Life = Literal["closed", "open", "connecting", "connected", "running"]
"""Of the epoch."""


class EpochStuck(RuntimeError):
    """An epoch did not end in time after `stop`: only another process can take this rank's place."""


class Worker:
    """host: the private address that its sockets bind to."""

    def __init__(self, config: EngineConfig, stage: int, tp_rank: int, host: str) -> None:
        self._config = config
        self._plan = config.plan
        self._stage = stage
        self._tp_rank = tp_rank
        self._rank = stage * self._plan.tp_size + tp_rank
        self._is_first = stage == 0
        self._is_last = stage == self._plan.pp_size - 1
        self._host = host
        self._device = pick_device(config.device, tp_rank)
        self._context = zmq.Context()
        self._runner = ModelRunner(config, stage, tp_rank, self._device)
        self._channel: WorkerChannel | None = None
        self._groups = ProcessGroups(config, self._rank, self._device)
        self._transport: ActivationTransport = DistTransport(None, None)
        self._num_blocks = 0
        self._turn = threading.Condition()
        """Guards `_epoch` and `_life`, and what `open` makes."""
        self._epoch = 0
        self._life: Life = "closed"
        self._stop = threading.Event()
        self._next_step = 0
        self._messages: deque[StepPlan | StopRun] = deque()
        """Received and not run yet."""
        # On stage 0: of the latest steps, more than can be in flight.
        self._sampled_tokens: deque[SampledTokens] = deque(maxlen=self._plan.pp_size + 2)
        self._spans: list[tuple[float, float]] = []
        self._stats_sent_at = 0.0
        self._progress = (0, "created", time.monotonic())

    @property
    def channel(self) -> WorkerChannel:
        assert self._channel is not None, "open() comes first"
        return self._channel

    def load(self) -> None:
        self._enter("weights")
        self._runner.load()
        self._enter("idle")

    def profile(self) -> int:
        """KV blocks that fit beside this rank's weights."""
        self._enter("KV profile")
        num_blocks = self._runner.max_kv_blocks()
        self._enter("idle")
        return num_blocks

    # -- wiring ------------------------------------------------------------------------------------------

    def open(self, epoch: int) -> Endpoints:
        """Open this epoch's sockets, once what runs in an earlier one has ended. Raises EpochStuck if it does not."""
        with self._turn:
            self._check_newer(epoch)
            self._end_before(epoch)
            if not self._turn.wait_for(lambda: self._is_free(epoch), JOIN_TIMEOUT_S):
                step, phase, _ = self._progress
                where = f"phase '{phase}' of step {step}"
                raise EpochStuck(f"epoch {self._epoch} was still in {where} {JOIN_TIMEOUT_S:g} s after it was stopped")
            self._check_newer(epoch)  # another `open` may have come first
            self._disconnect()
            self._life = "closed"
            self._epoch = epoch
            self._next_step = 0
            self._messages.clear()
            self._sampled_tokens.clear()
            self._spans.clear()
            self._stop.clear()
            self._channel = WorkerChannel(self._context, self._host)
            endpoints = Endpoints(self._channel.address, self._groups.open(self._host))
            self._life = "open"
            return endpoints

    def _check_newer(self, epoch: int) -> None:
        if epoch <= self._epoch:
            raise RuntimeError(f"epoch {epoch} is refused: this worker is already in epoch {self._epoch}")

    def connect(self, wiring: Wiring, make_transport: Callable[[], ActivationTransport] | None = None) -> None:
        """Join the lane: process groups, transport, KV cache. All ranks must call it at the same time.

        `make_transport` replaces point-to-point. Raises what `torch.distributed` raises if a peer is missing, and
        RuntimeError if it is stopped.
        """
        with self._in_epoch(wiring.epoch, "open", "connecting", "connected"):
            self._enter("rendezvous")
            samples = self._is_last and self._tp_rank == 0
            own_address = self.channel.address  # it keeps its own tokens
            sampled_tokens_to = [to for to in wiring.sampled_tokens_to if samples and to != own_address]
            self.channel.connect(wiring.results_to, sampled_tokens_to)
            self._runner.set_group(self._groups.join(wiring, self._stop.is_set))
            self._enter("kv cache")
            if wiring.num_blocks != self._num_blocks:
                self._runner.allocate_kv(wiring.num_blocks)
                self._num_blocks = wiring.num_blocks
            previous_rank = None if self._is_first else self._rank - self._plan.tp_size
            next_rank = None if self._is_last else self._rank + self._plan.tp_size
            self._transport = make_transport() if make_transport else DistTransport(previous_rank, next_rank)

    @contextmanager
    def _in_epoch(self, epoch: int, before: Life, during: Life, after: Life) -> Iterator[None]:
        """One step in the life of `epoch`; RuntimeError if it is not due. A failure closes the epoch."""
        with self._turn:
            if epoch != self._epoch:
                raise RuntimeError(f"epoch {epoch} is refused: this worker is in epoch {self._epoch}")
            if self._life != before:
                raise RuntimeError(f"epoch {epoch} is {self._life}, and not {before}")
            self._life = during
        ended: Life = "closed"
        try:
            yield
            ended = after
        finally:
            try:
                if ended == "closed":
                    self._disconnect()
            finally:
                self._enter("idle")
                with self._turn:
                    self._life = ended
                    self._turn.notify_all()

    def close(self) -> None:
        """Free the sockets; safe to call twice. `run` must have ended."""
        with self._turn:
            self._disconnect()
            self._life = "closed"
        self._context.term()

    def _disconnect(self) -> None:
        self._transport.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._groups.close()

    def _enter(self, phase: str, step: int = 0) -> None:
        self._progress = (step, phase, time.monotonic())

    # -- the run loop ------------------------------------------------------------------------------------

    def run(self, epoch: int) -> None:
        """Run plans until StopRun or `stop`. Ends the epoch. Raises PeerLost, or what this rank's own work raised."""
        with self._in_epoch(epoch, "connected", "running", "closed"), torch.inference_mode():
            self._stats_sent_at = time.monotonic()
            while not self._stop.is_set():
                if self._messages:
                    message = self._messages.popleft()
                    if isinstance(message, StopRun):
                        return
                    self._step(message)
                elif not self._poll_messages():
                    self._send_stats()

    def _poll_messages(self) -> bool:
        """Take in what has come; False if nothing valid came for POLL_MS."""
        messages = self.channel.receive(POLL_MS)
        for message in messages:
            if message.epoch == self._epoch:
                if isinstance(message, SampledTokens):
                    self._sampled_tokens.append(message)
                else:
                    self._messages.append(message)
        return bool(messages)

    def _step(self, plan: StepPlan) -> None:
        """Activations in, forward, activations or tokens out."""
        if plan.step != self._next_step:
            raise RuntimeError(f"step {plan.step} came while step {self._next_step} was due")
        self._next_step += 1
        hidden = None
        if not self._is_first:
            self._enter("activations", plan.step)
            hidden = self._transport.receive(plan.step, self._runner.empty_hidden(len(plan.token_ids) // 4))
        sampled_token_ids = self._wait_for_sampled_tokens(plan)
        if sampled_token_ids is None:
            return
        self._enter("model", plan.step)
        started = time.time()
        with self._blamed(plan):
            hidden = self._runner.execute(plan, hidden, sampled_token_ids)
            result = self._runner.sample(plan, hidden) if self._is_last else None
        self._spans.append((started, time.time()))
        self._enter("hand over", plan.step)
        if not self._is_last:
            self._transport.send(plan.step, hidden)
        elif result is not None:
            self._send_result(result)
        self._enter("idle", plan.step)
        if time.monotonic() - self._stats_sent_at > STATS_PERIOD_S:
            self._send_stats()

    @contextmanager
    def _blamed(self, plan: StepPlan) -> Iterator[None]:
        """Tell the leader what this rank's own work raises; what a lost peer causes is no news of the step."""
        try:
            yield
        except PeerLost:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.channel.send(StepFailure(plan.epoch, plan.step, self._stage, self._tp_rank, why))
            raise

    def _wait_for_sampled_tokens(self, plan: StepPlan) -> list[int] | None:
        """The tokens for the plan's placeholders, on stage 0; None if the worker is stopped meanwhile.

        Has no deadline: the leader stops this worker when the step that samples them is overdue.
        """
        if not self._is_first or plan.placeholder_step < 0:
            return []
        self._enter("tokens", plan.step)
        while not self._stop.is_set():
            for tokens in self._sampled_tokens:
                if tokens.step == plan.placeholder_step:
                    return tokens.token_ids
            self._poll_messages()
        return None

    def _send_result(self, result: StepResult) -> None:
        if result.token_ids:
            tokens = SampledTokens(result.epoch, result.step, result.token_ids)
            self.channel.send_sampled_tokens(tokens)  # first, because stage 0 may wait for it
            if self._is_first:
                self._sampled_tokens.append(tokens)
        self.channel.send(result)

    def _send_stats(self) -> None:
        self._stats_sent_at = time.monotonic()
        spans, self._spans = self._spans, []
        if not spans or self._tp_rank > 0:
            return
        stats = WorkerStats(self._epoch, self._stage, spans, self._runner.take_expert_tokens())
        if stats.expert_tokens:
            loads = self._runner.expert_load().values()
            stats.expert_imbalance = [max(load) * len(load) / sum(load) for load in loads]
        self.channel.send(stats)

    # -- for other threads -------------------------------------------------------------------------------

    def stop(self, epoch: int | None = None) -> None:
        """End `epoch`, not a later one, after its current step; None: whatever runs. May take ABORT_AFTER_S."""
        with self._turn:
            if epoch is None or epoch == self._epoch:
                self._stop.set()
                self._wake_up()
                self._end_before(self._epoch + 1)

    def _end_before(self, epoch: int) -> None:
        """Tell what runs in an epoch before `epoch` to stop, and on CUDA end its waiting for lost peers."""
        if self._is_free(epoch) or self._device.type != "cuda":
            return
        if not self._turn.wait_for(lambda: self._is_free(epoch), ABORT_AFTER_S):
            self._groups.abort()

    def _is_free(self, epoch: int) -> bool:
        """Nothing runs in an epoch before `epoch`; what does is told to stop. `_turn` is held."""
        if self._epoch >= epoch or self._life not in ("connecting", "running"):
            return True
        self._stop.set()
        self._wake_up()
        return False

    def _wake_up(self) -> None:
        """Let a run loop that waits for a plan see that it is stopped."""
        if self._life == "running" and self._channel is not None:
            self._channel.interrupt(StopRun(self._epoch))

    def device_is_broken(self) -> bool:
        """A CUDA context that failed once (an illegal access, say) fails for ever: only a new process has another."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False

    def progress(self) -> Progress:
        step, phase, since = self._progress
        return Progress(self._stage, self._tp_rank, self._epoch, step, phase, time.monotonic() - since)


def pick_device(kind: str, tp_rank: int) -> torch.device:
    """On CUDA number 0 where CUDA_VISIBLE_DEVICES is set: Ray shows a worker only its own."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("device=cuda: this worker sees no CUDA device")
        index = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") else tp_rank
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")

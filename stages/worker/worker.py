"""One rank of one stage: wired into a lane for an epoch at a time, running step plans until told to stop.

Life: `load` and `profile` once, then for every epoch `open` → `connect` → `run`. `stop` and `progress` may be called
from any thread at any time, the others by one caller at a time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import zmq
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.layers.tensor_parallel import DistGroup, SingleRank, TensorGroup
from stagemesh.stages.messages.channel import WorkerChannel
from stagemesh.stages.messages.step import SampledTokens, StepPlan, StepResult, StopRun, WorkerStats
from stagemesh.stages.messages.wiring import Endpoints, Progress, Wiring
from stagemesh.stages.worker.model_runner import ModelRunner
from stagemesh.stages.worker.transport import ActivationTransport, DistTransport

POLL_MS = 100
"""How soon an idle worker sees `stop`."""
STATS_PERIOD_S = 1.0


class Worker:
    """host: the private address that its sockets bind to."""

    def __init__(self, config: EngineConfig, stage: int, tp_rank: int, host: str) -> None:
        self._config = config
        self._plan = config.plan
        self._stage = stage
        self._tp_rank = tp_rank
        self._rank = stage * self._plan.tp_size + tp_rank
        self._world_size = self._plan.pp_size * self._plan.tp_size
        self._is_first = stage == 0
        self._is_last = stage == self._plan.pp_size - 1
        self._host = host
        self._device = pick_device(config.device, tp_rank)
        self._context = zmq.Context()
        self._runner = ModelRunner(config, stage, tp_rank, self._device)
        self._channel: WorkerChannel | None = None
        self._store: TCPStore | None = None
        self._transport: ActivationTransport = DistTransport(None, None)
        self._num_blocks = 0
        self._stop = threading.Event()
        self._epoch = 0
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
        """Open this epoch's sockets; closes those of an earlier one."""
        self._disconnect()
        self._epoch = epoch
        self._messages.clear()
        self._sampled_tokens.clear()
        self._spans.clear()
        self._stop.clear()
        self._channel = WorkerChannel(self._context, self._host)
        port = None
        if self._rank == 0 and self._world_size > 1:
            self._store = TCPStore(self._host, 0, self._world_size, is_master=True, wait_for_workers=False)
            port = self._store.port
        return Endpoints(self._channel.address, port)

    def connect(self, wiring: Wiring, make_transport: Callable[[], ActivationTransport] | None = None) -> None:
        """Join the lane: process groups, transport, KV cache. All ranks must call it at the same time.

        `make_transport` replaces point-to-point. Raises what `torch.distributed` raises if a peer is missing.
        """
        assert wiring.epoch == self._epoch, "open() comes first"
        self._enter("rendezvous")
        samples = self._is_last and self._tp_rank == 0
        own_address = self.channel.address  # it keeps its own tokens
        sampled_tokens_to = [to for to in wiring.sampled_tokens_to if samples and to != own_address]
        self.channel.connect(wiring.results_to, sampled_tokens_to)
        self._runner.set_group(self._init_process_groups(wiring))
        self._enter("kv cache")
        if wiring.num_blocks != self._num_blocks:
            self._runner.allocate_kv(wiring.num_blocks)
            self._num_blocks = wiring.num_blocks
        previous_rank = None if self._is_first else self._rank - self._plan.tp_size
        next_rank = None if self._is_last else self._rank + self._plan.tp_size
        self._transport = make_transport() if make_transport else DistTransport(previous_rank, next_rank)
        self._enter("idle")

    def _init_process_groups(self, wiring: Wiring) -> TensorGroup:
        if self._world_size == 1:
            return SingleRank()
        if self._store is None:
            timeout = timedelta(seconds=self._config.startup_timeout_s)
            self._store = TCPStore(wiring.store_host, wiring.store_port, self._world_size, timeout=timeout)
        dist.init_process_group(
            backend="nccl" if self._device.type == "cuda" else "gloo",
            store=PrefixStore(f"epoch-{wiring.epoch}", self._store),
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=self._config.peer_timeout_s),
        )
        tp_size = self._plan.tp_size
        if tp_size == 1:
            return SingleRank()
        # Every rank makes the groups of all stages, as torch.distributed asks for.
        groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, self._world_size, tp_size)]
        return DistGroup(groups[self._stage])

    def close(self) -> None:
        """Free the sockets; safe to call twice. `run` must have ended."""
        self._disconnect()
        self._context.term()

    def _disconnect(self) -> None:
        self._transport.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

    def _enter(self, phase: str, step: int = 0) -> None:
        self._progress = (step, phase, time.monotonic())

    # -- the run loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run plans until StopRun or `stop`. Raises if a peer is lost. Ends the epoch."""
        self._stats_sent_at = time.monotonic()
        try:
            with torch.inference_mode():
                while not self._stop.is_set():
                    if self._messages:
                        message = self._messages.popleft()
                        if isinstance(message, StopRun):
                            return
                        self._step(message)
                    elif not self._poll_messages():
                        self._send_stats()
        finally:
            self._disconnect()
            self._enter("idle")

    def _poll_messages(self) -> bool:
        """Take in the next message; False if none came for POLL_MS."""
        message = self.channel.receive(POLL_MS)
        if message is None:
            return False
        if message.epoch == self._epoch:
            if isinstance(message, SampledTokens):
                self._sampled_tokens.append(message)
            else:
                self._messages.append(message)
        return True

    def _step(self, plan: StepPlan) -> None:
        """Activations in, forward, activations or tokens out."""
        hidden = None
        if not self._is_first:
            self._enter("activations", plan.step)
            hidden = self._transport.receive(plan.step, self._runner.empty_hidden(len(plan.token_ids) // 4))
        sampled_token_ids = self._wait_for_sampled_tokens(plan)
        if sampled_token_ids is None:
            return
        self._enter("model", plan.step)
        started = time.time()
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

    def stop(self, epoch: int) -> None:
        """End the run of `epoch`, not of a later one, after its current step."""
        if epoch == self._epoch:
            self._stop.set()

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

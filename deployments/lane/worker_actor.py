"""The ShardWorker actor. Imports torch only in its own process."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import NoReturn

import ray
from ray.actor import ActorHandle

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.mailbox import Mailbox, Raw
from stagemesh.stages.messages.wiring import Endpoints, Progress, Wiring

logger = logging.getLogger(__name__)

CPU_NICENESS = 10
"""Of ranks that compute on a CPU: steps leave it to what is short and awaited, such as routers, leaders, proxies."""
MAX_CONCURRENCY = 8
"""Threads: `watch` and `run` occupy one each, the others serve short calls."""
OWNER_CHECK_PERIOD_S = 10.0
OWNER_TIMEOUT_S = 30.0
"""A replica that does not answer for so long is frozen. Serve asks those that run, but has no deadline for one that is
still in its constructor."""


@ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=MAX_CONCURRENCY)
class ShardWorker:
    """`stages.worker.worker.Worker` as an actor, owned by a `WorkerGroup`."""

    def __init__(self, config: EngineConfig, stage: int, tp_rank: int, owner: ActorHandle | None = None) -> None:
        """owner: the replica that this worker belongs to; killed, so that Serve replaces it, when it is frozen."""
        from stagemesh.stages.worker.worker import Worker

        limit_threads(config)
        self._config = config
        self._name = f"stage {stage} rank {tp_rank}"
        self._worker = Worker(config, stage, tp_rank, ray.util.get_node_ip_address())
        self._mailbox = Mailbox()
        if owner is not None:
            threading.Thread(target=_end_if_frozen, args=(owner, self._name), name="owner", daemon=True).start()

    def pid(self) -> int:
        return os.getpid()

    def watch(self) -> None:
        """Never returns: this call fails as soon as the process dies."""
        threading.Event().wait()

    def load(self) -> None:
        self._worker.load()

    def profile(self) -> int:
        """The number of KV blocks."""
        return self._worker.profile()

    def open(self, epoch: int) -> Endpoints:
        from stagemesh.stages.worker.worker import EpochStuck

        self._mailbox.open(epoch)  # wakes a rank that waits for activations of an older epoch
        try:
            return self._worker.open(epoch)
        except EpochStuck as error:
            self._end_process(str(error))

    def connect(self, wiring: Wiring, next_worker: ActorHandle | None) -> None:
        """next_worker: the same rank of the next stage."""
        if self._config.transport == "object_store":
            from stagemesh.deployments.lane.object_store import ObjectStoreTransport

            self._worker.connect(
                wiring,
                lambda: ObjectStoreTransport(self._mailbox, next_worker, wiring.epoch, self._config.peer_timeout_s),
            )
        else:
            self._worker.connect(wiring)

    def run(self, epoch: int) -> None:
        if self._config.device == "cpu":
            os.setpriority(os.PRIO_PROCESS, 0, CPU_NICENESS)  # Linux: of this thread and those it starts
        try:
            self._worker.run(epoch)
        except Exception as error:
            if self._worker.device_is_broken():
                self._worker.close()  # sends what it still has to say
                self._end_process(f"its CUDA context is broken: {error}")
            raise

    def stop(self, epoch: int | None) -> None:
        """None: whatever runs. As `Worker.stop`."""
        self._mailbox.end(epoch)  # wakes a rank that waits for activations
        self._worker.stop(epoch)

    def progress(self) -> Progress:
        return self._worker.progress()

    def _end_process(self, why: str) -> NoReturn:
        """The group sees the death and starts this rank anew."""
        logger.error("%s: %s; the process ends and is replaced", self._name, why)
        os._exit(1)

    def deliver(self, epoch: int, step: int, hidden: Raw) -> None:
        """Called by the stage before."""
        self._mailbox.put(epoch, step, hidden)


def _end_if_frozen(owner: ActorHandle, name: str) -> None:
    """Kill `owner` when it stops answering; return when it has died. `__ray_ready__` is Ray's no-op."""
    answered_at = time.monotonic()
    while time.monotonic() - answered_at < OWNER_TIMEOUT_S:
        time.sleep(OWNER_CHECK_PERIOD_S)
        try:
            ray.get(owner.__ray_ready__.remote(), timeout=OWNER_TIMEOUT_S)
            answered_at = time.monotonic()
        except ray.exceptions.ActorDiedError:
            return
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError) as error:
            logger.warning("%s: its replica does not answer: %s", name, type(error).__name__)
    logger.error("%s: its replica has not answered for %g s, killed", name, OWNER_TIMEOUT_S)
    ray.kill(owner)


def limit_threads(config: EngineConfig) -> None:
    """Share the cores among a lane's ranks: more threads slow every step."""
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // (config.plan.tp_size * config.plan.pp_size)))

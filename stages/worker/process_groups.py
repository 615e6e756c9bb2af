"""What a rank has of torch.distributed in an epoch: the rendezvous store and the process groups."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.layers.tensor_parallel import DistGroup, SingleRank, TensorGroup
from stagemesh.stages.messages.wiring import Wiring

STORE_RETRY_S = 1.0
RENDEZVOUS_POLL_S = 0.01


class ProcessGroups:
    """In each epoch `open`, `join`, `close`, by one caller at a time; `abort` by any."""

    def __init__(self, config: EngineConfig, rank: int, device: torch.device) -> None:
        """rank: in the lane."""
        self._config = config
        self._rank = rank
        self._world_size = config.plan.pp_size * config.plan.tp_size
        self._device = device
        self._store: TCPStore | None = None
        self._groups: list[dist.ProcessGroup] = []

    def open(self, host: str) -> int | None:
        """The port of the lane's store, which rank 0 has in a lane of several ranks; else None."""
        if self._rank > 0 or self._world_size == 1:
            return None
        self._store = TCPStore(host, 0, self._world_size, is_master=True, wait_for_workers=False)
        port: int = self._store.port
        return port

    def join(self, wiring: Wiring, is_stopped: Callable[[], bool]) -> TensorGroup:
        """The group of this rank's stage. All ranks call it; RuntimeError when stopped, or what torch raises."""
        if self._world_size == 1:
            return SingleRank()
        dist.init_process_group(
            backend="nccl" if self._device.type == "cuda" else "gloo",
            store=self._meet(wiring, is_stopped),
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=self._config.peer_timeout_s),
        )
        assert dist.group.WORLD is not None
        self._groups = [dist.group.WORLD]
        tp_size = self._config.plan.tp_size
        if tp_size == 1:
            return SingleRank()
        # Every rank makes the groups of all stages, as torch.distributed asks for.
        groups = [dist.new_group(list(range(first, first + tp_size))) for first in range(0, self._world_size, tp_size)]
        self._groups.append(groups[self._rank // tp_size])
        return DistGroup(self._groups[-1])

    def _meet(self, wiring: Wiring, is_stopped: Callable[[], bool]) -> PrefixStore:
        """The epoch's store, once all ranks are there: what torch.distributed does then cannot be stopped."""
        timeout_s = self._config.startup_timeout_s
        deadline = time.monotonic() + timeout_s

        def check() -> None:
            if is_stopped():
                raise RuntimeError(f"epoch {wiring.epoch} was stopped during its rendezvous")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all ranks came within startup_timeout_s={timeout_s:g}")

        while self._store is None:
            try:
                self._store = TCPStore(
                    wiring.store_host,
                    wiring.store_port,
                    self._world_size,
                    timeout=timedelta(seconds=STORE_RETRY_S),
                    wait_for_workers=False,
                )
            except dist.DistError:  # out of reach for STORE_RETRY_S
                check()
        self._store.set_timeout(timedelta(seconds=timeout_s))
        store = PrefixStore(f"epoch-{wiring.epoch}", self._store)
        store.set(f"rank-{self._rank}", "here")
        while not store.check([f"rank-{rank}" for rank in range(self._world_size)]):
            check()
            time.sleep(RENDEZVOUS_POLL_S)
        return store

    def abort(self) -> None:
        """End what waits for a lost peer, on CUDA: NCCL would wait for ever, gloo's calls end by themselves."""
        if self._device.type == "cuda":
            for group in self._groups:
                group.abort()

    def close(self) -> None:
        """Safe to call twice."""
        self.abort()  # destroying them may wait for peers too
        if dist.is_initialized():
            dist.destroy_process_group()
        self._groups = []
        self._store = None

"""Activations through Ray's object store, as arguments of actor calls: slower than point-to-point, works everywhere.

Calls may run in any order, so each carries its step.
"""

from __future__ import annotations

import torch
from ray.actor import ActorHandle

from stagemesh.deployments.lane.mailbox import Mailbox
from stagemesh.stages.layers.tensor_parallel import PeerLost


class ObjectStoreTransport:
    """An `ActivationTransport` (stages/worker/transport.py) over actor calls."""

    def __init__(self, mailbox: Mailbox, next_worker: ActorHandle | None, epoch: int, timeout_s: float) -> None:
        self._mailbox = mailbox
        self._next_worker = next_worker
        self._epoch = epoch
        self._timeout_s = timeout_s

    def send(self, step: int, hidden: torch.Tensor) -> None:
        # As bytes, because numpy has no bfloat16. Ray's serializer copies them.
        raw = hidden.cpu().contiguous().view(torch.uint8).numpy()
        assert self._next_worker is not None
        self._next_worker.deliver.remote(self._epoch, step, raw)

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        try:
            raw = self._mailbox.take(self._epoch, step, self._timeout_s)
        except (TimeoutError, RuntimeError) as error:
            raise PeerLost(str(error)) from error
        # A copy, because arrays out of the object store are read-only and torch warns of those.
        into.view(torch.uint8).copy_(torch.from_numpy(raw.copy()))
        return into

    def close(self) -> None:
        self._mailbox.end(self._epoch)

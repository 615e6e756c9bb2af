"""Activations through Ray's object store: works wherever Ray does, slower than point-to-point.

The sender passes the tensor as an argument of an actor call to the same rank of the next stage; Ray puts
anything large into the object store. Calls may run in any order, so every delivery carries its step.
"""

from __future__ import annotations

import threading
import time

import torch
from ray.actor import ActorHandle


class Mailbox:
    """Activations that have arrived, by step; one reader (the run loop), any number of writers."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._epoch = 0
        self._arrived: dict[int, object] = {}

    def open(self, epoch: int) -> None:
        """Forget older epochs; what still comes from them is dropped."""
        with self._condition:
            self._epoch = epoch
            self._arrived.clear()

    def put(self, epoch: int, step: int, hidden: object) -> None:
        with self._condition:
            if epoch == self._epoch:
                self._arrived[step] = hidden
                self._condition.notify_all()

    def take(self, epoch: int, step: int, timeout_s: float) -> object:
        """Wait for the activations of `step`; TimeoutError names what did not come."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while step not in self._arrived:
                if epoch != self._epoch:
                    raise RuntimeError(f"epoch {epoch} is over")
                left = deadline - time.monotonic()
                if left <= 0 or not self._condition.wait(left):
                    raise TimeoutError(
                        f"no activations for step {step} from the stage before within {timeout_s:g} s"
                    )
            return self._arrived.pop(step)


class ObjectStoreTransport:
    """An `ActivationTransport` (see `stages/transport.py`) over actor calls."""

    def __init__(
        self, mailbox: Mailbox, next_worker: ActorHandle | None, epoch: int, timeout_s: float
    ) -> None:
        self._mailbox = mailbox
        self._next_worker = next_worker
        self._epoch = epoch
        self._timeout_s = timeout_s

    def send(self, step: int, hidden: torch.Tensor) -> None:
        # bfloat16 has no numpy twin; the bytes travel as int16. A copy is made by the serializer.
        raw = hidden.cpu().contiguous().view(torch.uint8).numpy()
        assert self._next_worker is not None
        self._next_worker.deliver.remote(self._epoch, step, raw)

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        raw = self._mailbox.take(self._epoch, step, self._timeout_s)
        # Arrays out of the object store are read-only: copy into our own buffer.
        into.view(torch.uint8).copy_(torch.from_numpy(raw.copy()))
        return into

    def close(self) -> None:
        self._mailbox.open(-1)

"""Activations delivered to a worker by other actors."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.uint8]
"""Bytes of a tensor; read-only from the object store."""

NO_EPOCH = -1


class Mailbox:
    """By step. One reader (the run loop), any number of writers."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._epoch = NO_EPOCH
        self._arrived: dict[int, Raw] = {}

    def open(self, epoch: int) -> None:
        """Drop what older epochs sent, also later."""
        with self._condition:
            self._epoch = epoch
            self._arrived.clear()
            self._condition.notify_all()

    def end(self, epoch: int) -> None:
        """Wake a reader that waits for `epoch`; no effect in a later one."""
        with self._condition:
            if epoch == self._epoch:
                self.open(NO_EPOCH)

    def put(self, epoch: int, step: int, hidden: Raw) -> None:
        with self._condition:
            if epoch == self._epoch:
                self._arrived[step] = hidden
                self._condition.notify_all()

    def take(self, epoch: int, step: int, timeout_s: float) -> Raw:
        """Wait for `step`. Raises TimeoutError, or RuntimeError when the epoch is over."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while epoch == self._epoch and step not in self._arrived:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or not self._condition.wait(remaining_s):
                    raise TimeoutError(f"no activations for step {step} from the stage before within {timeout_s:g} s")
            if epoch != self._epoch:
                raise RuntimeError(f"epoch {epoch} is over")
            return self._arrived.pop(step)

"""Where a worker finds the activations that other actors deliver to it."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.uint8]
"""The bytes of a tensor; read-only when they come from the object store."""

NO_EPOCH = -1


class Mailbox:
    """Activations that have arrived, by step; one reader (the run loop), any number of writers."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._epoch = NO_EPOCH
        self._arrived: dict[int, Raw] = {}

    def open(self, epoch: int) -> None:
        """Forget older epochs; what still comes from them is dropped."""
        with self._condition:
            self._epoch = epoch
            self._arrived.clear()
            self._condition.notify_all()

    def end(self, epoch: int) -> None:
        """Nothing more is wanted of `epoch`: who waits for it is woken. A later epoch goes on."""
        with self._condition:
            if epoch == self._epoch:
                self.open(NO_EPOCH)

    def put(self, epoch: int, step: int, hidden: Raw) -> None:
        with self._condition:
            if epoch == self._epoch:
                self._arrived[step] = hidden
                self._condition.notify_all()

    def take(self, epoch: int, step: int, timeout_s: float) -> Raw:
        """Wait for the activations of `step`. TimeoutError names what did not come; RuntimeError: the epoch is over."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while epoch == self._epoch and step not in self._arrived:
                left = deadline - time.monotonic()
                if left <= 0 or not self._condition.wait(left):
                    raise TimeoutError(f"no activations for step {step} from the stage before within {timeout_s:g} s")
            if epoch != self._epoch:
                raise RuntimeError(f"epoch {epoch} is over")
            return self._arrived.pop(step)

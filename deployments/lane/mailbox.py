"""Activations delivered to a worker by other actors."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.uint8]
"""Bytes of a tensor; read-only from the object store."""


class Mailbox:
    """By step. One reader (the run loop), any number of writers."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._epoch = 0
        self._is_open = False
        self._arrived: dict[int, Raw] = {}

    def open(self, epoch: int) -> None:
        """End older epochs, and drop what they sent, also later. No effect in a later epoch."""
        with self._condition:
            if epoch > self._epoch:
                self._epoch = epoch
                self._is_open = True
                self._clear()

    def end(self, epoch: int | None = None) -> None:
        """Wake a reader that waits for `epoch`; None: for any. No effect in a later one."""
        with self._condition:
            if epoch is None or epoch == self._epoch:
                self._is_open = False
                self._clear()

    def _clear(self) -> None:
        self._arrived.clear()
        self._condition.notify_all()

    def _serves(self, epoch: int) -> bool:
        return self._is_open and epoch == self._epoch

    def put(self, epoch: int, step: int, hidden: Raw) -> None:
        with self._condition:
            if self._serves(epoch):
                self._arrived[step] = hidden
                self._condition.notify_all()

    def take(self, epoch: int, step: int, timeout_s: float) -> Raw:
        """Wait for `step`. Raises TimeoutError, or RuntimeError when the epoch is over."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while self._serves(epoch) and step not in self._arrived:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or not self._condition.wait(remaining_s):
                    raise TimeoutError(f"no activations for step {step} from the stage before within {timeout_s:g} s")
            if not self._serves(epoch):
                raise RuntimeError(f"epoch {epoch} is over")
            return self._arrived.pop(step)

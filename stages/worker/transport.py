"""How activations go from one stage to the next.

A way to move them is one short class: `torch.distributed` point-to-point here (NCCL on CUDA, gloo on CPU), Ray's
object store in `deployments/lane/object_store.py`. Rank r of a stage talks to rank r of its neighbours only: after
the last all-reduce of a stage every rank of its group holds the same activations.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist

MAX_SENDS_IN_FLIGHT = 4
"""A sender waits for its oldest send beyond this many: back-pressure where the next stage is slower."""


class ActivationTransport(Protocol):
    """Moves `hidden` [T, hidden_size] of one step from a stage to the next."""

    def send(self, step: int, hidden: torch.Tensor) -> None:
        """Send `hidden`; it must not be written to afterwards. May return before it has arrived."""

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        """Wait for the activations of `step`; `into` has their shape, dtype and device and may hold them."""

    def close(self) -> None:
        """Drop everything in flight; safe to call twice."""


class DistTransport:
    """`torch.distributed` point-to-point. Steps arrive in the order of sending, so their numbers are not sent."""

    def __init__(self, previous_rank: int | None, next_rank: int | None) -> None:
        self._previous_rank = previous_rank
        self._next_rank = next_rank
        self._in_flight: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, step: int, hidden: torch.Tensor) -> None:
        hidden = hidden.contiguous()
        work = dist.isend(hidden, self._next_rank)
        assert work is not None
        self._in_flight.append((work, hidden))  # the buffer must live until it is sent
        while self._in_flight and (len(self._in_flight) > MAX_SENDS_IN_FLIGHT or self._in_flight[0][0].is_completed()):
            self._in_flight.popleft()[0].wait()

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        dist.recv(into, self._previous_rank)
        return into

    def close(self) -> None:
        self._in_flight.clear()


class NoTransport:
    """For a lane of one stage: there is nothing to move."""

    def send(self, step: int, hidden: torch.Tensor) -> None:
        raise AssertionError("a lane of one stage sends no activations")

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a lane of one stage receives no activations")

    def close(self) -> None:
        pass

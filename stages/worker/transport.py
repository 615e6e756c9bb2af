"""Moves activations from one stage to the next, point-to-point (NCCL on CUDA, gloo on CPU).

`deployments/lane/object_store.py` moves them by Ray's object store. Rank r of a stage talks only to rank r of its
neighbours, because after a stage's last all-reduce all its ranks have the same activations.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist

from stagemesh.stages.layers.tensor_parallel import PEERS

MAX_SENDS_IN_FLIGHT = 4
"""Beyond these a sender waits for its oldest send: back-pressure from a slower stage."""


class ActivationTransport(Protocol):
    """Moves `hidden` [T, hidden_size] to the next stage. Raises PeerLost."""

    def send(self, step: int, hidden: torch.Tensor) -> None:
        """Nobody may write to `hidden` afterwards. May return before it has arrived."""

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        """Wait for the activations of `step`; `into` has their shape, dtype and device and may hold them."""

    def close(self) -> None:
        """Drop everything in flight; safe to call twice."""


class DistTransport:
    """Steps arrive in the order of sending, so their numbers are not sent. A rank is None if there is no such stage."""

    def __init__(self, previous_rank: int | None, next_rank: int | None) -> None:
        self._previous_rank = previous_rank
        self._next_rank = next_rank
        self._in_flight: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, step: int, hidden: torch.Tensor) -> None:
        hidden = hidden.contiguous()
        with PEERS:
            work = dist.isend(hidden, self._next_rank)
            assert work is not None
            self._in_flight.append((work, hidden))  # the buffer must live until it is sent
            while self._must_wait():
                self._in_flight.popleft()[0].wait()

    def _must_wait(self) -> bool:
        """Or need not: what has been sent lets go of its buffer."""
        return bool(self._in_flight) and (
            len(self._in_flight) > MAX_SENDS_IN_FLIGHT or self._in_flight[0][0].is_completed()
        )

    def receive(self, step: int, into: torch.Tensor) -> torch.Tensor:
        with PEERS:
            dist.recv(into, self._previous_rank)
        return into

    def close(self) -> None:
        self._in_flight.clear()

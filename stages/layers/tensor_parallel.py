"""What the ranks of one stage do together.

Layers hold a `TensorShard`: their part and the `TensorGroup`, which is replaced when the lane is wired anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(RuntimeError):
    """A collective or a transfer failed: the cause is another rank, or the way to it."""


class _Peers:
    """What `torch.distributed` raises inside becomes PeerLost; what breaks this rank's own device stays what it is."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise PeerLost(f"{type(error).__name__}: {error}") from error


PEERS = _Peers()
"""`with PEERS:` around calls that wait for other ranks. Cheaper than a generator: there are several in each layer."""


class TensorGroup(Protocol):
    """Collectives over a stage; all ranks call them in the same order. They raise PeerLost."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum, the same bits on every rank; may overwrite `x`."""

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All `x`, of one shape, joined along `dim` in rank order."""

    def gather_to_rank0(self, x: Tensor, dim: int) -> Tensor | None:
        """As all_gather on rank 0; None on the others."""

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Sends send_rows[r] rows of `x` to rank r, returns receive_rows[r] rows from it, both in rank order."""


class SingleRank:
    """The group of a stage that is not split."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x

    def gather_to_rank0(self, x: Tensor, dim: int) -> Tensor | None:
        return x

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        return x


class DistGroup:
    """A `torch.distributed` process group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with PEERS:
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        parts, x = [torch.empty_like(x) for _ in range(self.size)], x.contiguous()
        with PEERS:
            dist.all_gather(parts, x, group=self._group)
        return torch.cat(parts, dim)

    def gather_to_rank0(self, x: Tensor, dim: int) -> Tensor | None:
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        x = x.contiguous()
        with PEERS:
            dist.gather(x, parts, group=self._group, group_dst=0)
        return torch.cat(parts, dim) if parts else None

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        received, x = x.new_empty(sum(receive_rows), *x.shape[1:]), x.contiguous()
        with PEERS:
            dist.all_to_all_single(received, x, list(receive_rows), list(send_rows), group=self._group)
        return received


@dataclass
class TensorShard:
    """Part `rank` of `size` of every layer of a stage."""

    rank: int = 0
    size: int = 1
    group: TensorGroup = field(default_factory=SingleRank)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else self.group.all_reduce(x)

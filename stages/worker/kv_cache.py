"""The paged KV cache of one rank: memory for the layers of its stage, in blocks that the leader allocates."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


class KVCache:
    """`layers[i]`: [num_blocks, *block_shape], the cache of the stage's i-th layer.

    With an fp8 dtype (e4m3) values are stored as they are, without a scale, and larger ones as ±448.
    Zeroed, because a slot that a mask hides must still hold a finite number.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers: list[Tensor] = [
            torch.zeros(num_blocks, *block_shape, dtype=dtype, device=device) for _ in range(num_layers)
        ]


def host_memory_available() -> int:
    """Bytes that this process can still take without swapping, also inside a container."""
    return min(_machine_available(), _container_available())


def _machine_available() -> int:
    with open("/proc/meminfo") as lines:
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) * 1024


def _container_available() -> int:
    """What the limit of a container leaves (cgroup v2); a huge number where there is none."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            return int(limit.read()) - int(current.read())
    except (OSError, ValueError):  # no such file, or the word "max"
        return sys.maxsize

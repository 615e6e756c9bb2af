"""Memory for the paged KV cache of one rank; the leader allocates its blocks."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def make_kv_cache(
    num_layers: int, num_blocks: int, block_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """[num_blocks, *block_shape] for each layer of the stage.

    With an fp8 dtype (e4m3) values are stored without a scale, larger ones as ±448. Zeroed, because a slot that a mask
    hides must hold a finite number.
    """
    return [torch.zeros(num_blocks, *block_shape, dtype=dtype, device=device) for _ in range(num_layers)]


def host_memory_available() -> int:
    """Bytes that this process can still take, also inside a container."""
    return min(_machine_available(), _container_available())


def _machine_available() -> int:
    with open("/proc/meminfo") as lines:
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) * 1024


def _container_available() -> int:
    """What the cgroup v2 limit leaves; a huge number without one."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            return int(limit.read()) - int(current.read())
    except (OSError, ValueError):  # no such file, or the word "max"
        return sys.maxsize

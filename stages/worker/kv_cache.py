"""Memory for the paged KV cache of one rank; the leader allocates its blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def make_kv_cache(
    num_layers: int, num_blocks: int, block_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """[num_blocks, *block_shape] for each layer of the stage.

    With an fp8 dtype (e4m3) values are stored without a scale, larger ones as ±448. Zeroed, because a slot that a mask
    hides must hold a finite number.
    """
    return [_zeros((num_blocks, *block_shape), dtype, device) for _ in range(num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy leaves the zeroing to the kernel, which gives memory to a block only when it is first written.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

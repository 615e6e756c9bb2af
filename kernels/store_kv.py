"""Write the keys and values of a step's tokens into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from stagemesh.kernels.quant_w8a8 import FP8_MAX


def store_kv(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Put token t of `kv` into slot `slots[t]` of `cache`.

    kv: [T, 2·K, D], key heads before value heads; may be strided, the last dim is contiguous.
    cache: [N, 2, K, B, D], contiguous, same dtype or float8_e4m3fn (clamped to ±448).
    slots: int64 [T], block · B + offset in the block; all different.
    """
    if kv.is_cuda and kv.dtype == cache.dtype:
        from stagemesh.kernels.store_kv_triton import store_kv_triton

        store_kv_triton(kv, cache, slots)
    else:
        store_kv_torch(kv, cache, slots)


def store_kv_torch(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    _, kv_factor, num_kv_heads, block_size, _ = cache.shape
    store_kv_rows(kv, cache, slot_rows(slots, kv_factor * num_kv_heads, block_size))


def slot_rows(slots: Tensor, num_heads: int, block_size: int) -> Tensor:
    """int64 [T, num_heads]: row of each head of each token in the cache seen as rows of D."""
    heads = torch.arange(num_heads, device=slots.device)
    block = slots.div(block_size, rounding_mode="floor") * num_heads
    return (block[:, None] + heads) * block_size + (slots % block_size)[:, None]


def store_kv_rows(kv: Tensor, cache: Tensor, rows: Tensor) -> None:
    """store_kv for `rows` from slot_rows, computed once per step for all layers."""
    if kv.dtype != cache.dtype:
        # Out of range would become NaN. torch indexes fp8 tensors as bytes only.
        kv = kv.clamp(-FP8_MAX, FP8_MAX).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache.view(-1, cache.shape[-1]).index_put_((rows,), kv)


def clear_blocks(cache: Tensor, rows: Tensor) -> None:
    """Zero `rows` (int64 [n]) of the cache seen as [N·2·K, B·D]."""
    # torch indexes fp8 tensors as bytes only; the byte 0 is the number 0.
    cache = cache if cache.itemsize > 1 else cache.view(torch.uint8)
    cache.view(-1, cache.shape[3] * cache.shape[4]).index_put_((rows,), cache.new_zeros(()))

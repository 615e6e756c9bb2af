"""Causal attention of a mixed batch (prefill chunks and decode tokens) over a paged KV cache.

Sequence s has `context_lens[s]` cached tokens and `query_lens[s]` tokens in this step, already stored in the cache.
Query i attends to the first context_lens[s] + i + 1 slots of its block table:  softmax(q·Kᵀ·scale)·V.
Query head h reads KV head h // G. With a sliding window of W it attends to the last W slots only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stagemesh.kernels.store_kv import store_kv

Ints = npt.NDArray[np.integer]


def paged_attention(
    q: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention output, [T, H, D] in the dtype of `q`.

    q: [T, H, D], sequences one after another; may be strided, the last dim is contiguous.
    cache: [N, 2, K, B, D], or [N, 1, K, B, D] of vectors that are key and value in one; dtype of `q`, or float8_e4m3fn.
    query_starts: int32 [S + 1], first token of each sequence, then T. context_lens: int32 [S].
    block_tables: int32 [S, max_blocks]; entries past the end of a sequence are not read.
    sliding_window: None = all slots.
    """
    if q.is_cuda and q.dtype == cache.dtype and cache.shape[1] == 2:
        from stagemesh.kernels.paged_attention_triton import paged_attention_triton

        return paged_attention_triton(q, cache, query_starts, context_lens, block_tables, scale, sliding_window)
    return paged_attention_torch(q, cache, query_starts, context_lens, block_tables, scale, sliding_window)


def paged_attention_torch(
    q: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    _, kv_factor, num_kv_heads, block_size, head_dim = cache.shape
    group = q.shape[1] // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = query_starts.tolist()
    for s, context_len in enumerate(context_lens.tolist()):
        start, end = starts[s], starts[s + 1]
        total = context_len + end - start
        blocks = block_tables[s, : -(-total // block_size)].long()
        kv = cache[blocks].permute(1, 2, 0, 3, 4).reshape(kv_factor, num_kv_heads, -1, head_dim)[:, :, :total]
        heads = kv.float().repeat_interleave(group, 1)
        key, value = heads[0], heads[-1]  # [H, L, D]
        scores = q[start:end].transpose(0, 1).float() @ key.transpose(1, 2) * scale  # [H, query, L]
        visible = torch.ones(end - start, total, dtype=torch.bool, device=q.device).tril(context_len)
        if sliding_window is not None:
            visible = visible.triu(context_len + 1 - sliding_window)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[start:end] = (weights @ value).transpose(0, 1).to(q.dtype)
    return out


@dataclass(frozen=True, slots=True)
class PagedAttentionStep:
    """Store and attend for one step, with lengths and tables on the device."""

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    sliding_window: int | None = None

    @classmethod
    def on_device(
        cls,
        query_lens: Ints,
        context_lens: Ints,
        block_tables: Ints,
        slots: Ints,
        device: torch.device,
        sliding_window: int | None = None,
    ) -> PagedAttentionStep:
        """From host arrays, as CpuPagedAttention.prepare."""
        starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)

        def put(array: Ints) -> Tensor:
            return torch.from_numpy(array).to(device)

        lens_and_tables = put(starts), put(context_lens.astype(np.int32)), put(block_tables.astype(np.int32))
        return cls(*lens_and_tables, put(slots.astype(np.int64)), sliding_window)

    def __call__(self, q: Tensor, kv: Tensor, cache: Tensor, scale: float) -> Tensor:
        """Store `kv` [T, 2·K, D]; attention of `q` [T, H, D], as [T, H·D]."""
        store_kv(kv, cache, self.slots)
        lens_and_tables = (self.query_starts, self.context_lens, self.block_tables)
        return paged_attention(q, cache, *lens_and_tables, scale, self.sliding_window).flatten(1)

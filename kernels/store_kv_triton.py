"""Triton kernel of store_kv.py, one program per token."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_kv_kernel(
    kv_ptr,
    cache_ptr,
    slots_ptr,
    token_stride,
    head_stride,
    NUM_VECTORS: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    m_hd = (o_h < NUM_VECTORS)[:, None] & (o_d < D)[None, :]
    slot = tl.load(slots_ptr + i_t).to(tl.int64)
    b_kv = tl.load(kv_ptr + i_t * token_stride + o_h[:, None] * head_stride + o_d[None, :], mask=m_hd, other=0.0)
    row = ((slot // B) * NUM_VECTORS + o_h) * B + slot % B
    tl.store(cache_ptr + row[:, None] * D + o_d[None, :], b_kv, mask=m_hd)


def store_kv_triton(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    num_tokens, num_vectors, head_dim = kv.shape
    assert cache.is_contiguous() and kv.stride(2) == 1
    assert (num_vectors, head_dim) == (cache.shape[1] * cache.shape[2], cache.shape[4])
    if num_tokens:
        _store_kv_kernel[(num_tokens,)](
            kv,
            cache,
            slots,
            kv.stride(0),
            kv.stride(1),
            NUM_VECTORS=num_vectors,
            B=cache.shape[3],
            D=head_dim,
            BLOCK_H=triton.next_power_of_2(num_vectors),
            BLOCK_D=triton.next_power_of_2(head_dim),
        )

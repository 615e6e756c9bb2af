"""Triton kernel of paged_attention.py: one pass with a running softmax (FlashAttention-2, arXiv:2307.08691).

A program takes one KV head and a tile of consecutive query tokens of one sequence, times its G query heads. Tiles are
numbered without reading lengths from the device: sequence s owns those from query_starts[s] // TILE + s on; one behind
its end returns at once. Contexts are not split, so a small decode batch does not fill a large GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PREFILL_ROWS, DECODE_ROWS = 64, 16
"""Tensor cores want at least 16; more rows reuse each key more often."""
BLOCK_N = 64
"""Slots of context per iteration."""


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    cache_ptr,
    query_starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    out_ptr,
    scale,
    num_sequences,
    q_token_stride,
    q_head_stride,
    table_stride,
    SLIDING_WINDOW: tl.constexpr,  # 0 = none
    K: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_tile, i_k = tl.program_id(0), tl.program_id(1)

    # The last sequence whose first tile is not behind this one.
    low, high = 0, num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_starts_ptr + middle) // TILE + middle <= i_tile:
            low = middle
        else:
            high = middle - 1
    start = tl.load(query_starts_ptr + low)
    query_len = tl.load(query_starts_ptr + low + 1) - start
    first = (i_tile - start // TILE - low) * TILE
    if first >= query_len:
        return
    context_len = tl.load(context_lens_ptr + low)
    visible = context_len + tl.minimum(first + TILE, query_len)

    o_row, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    o_query = first + o_row // G  # within the sequence
    m_row = (o_row < TILE * G) & (o_query < query_len)
    m_rd = m_row[:, None] & (o_d < D)[None, :]
    o_token = (start + o_query).to(tl.int64)
    o_head = i_k * G + o_row % G
    b_q = tl.load(
        q_ptr + o_token[:, None] * q_token_stride + o_head[:, None] * q_head_stride + o_d[None, :],
        mask=m_rd,
        other=0.0,
    )

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    oldest = 0  # that the first query of the tile sees
    if SLIDING_WINDOW:
        oldest = tl.maximum(context_len + first + 1 - SLIDING_WINDOW, 0) // BLOCK_N * BLOCK_N
    for slot in range(oldest, visible, BLOCK_N):
        o_n = slot + tl.arange(0, BLOCK_N)
        m_n = o_n < visible
        block = tl.load(block_tables_ptr + low * table_stride + o_n // B, mask=m_n, other=0).to(tl.int64)
        key_row = (block * (2 * K) + i_k) * B + o_n % B
        m_nd = m_n[:, None] & (o_d < D)[None, :]
        b_k = tl.load(cache_ptr + key_row[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
        b_v = tl.load(cache_ptr + (key_row + K * B)[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)

        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_visible = m_n[None, :] & (o_n[None, :] <= (context_len + o_query)[:, None])
        if SLIDING_WINDOW:
            m_visible = m_visible & (o_n[None, :] > (context_len + o_query - SLIDING_WINDOW)[:, None])
        b_scores = tl.where(m_visible, b_scores, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
        if SLIDING_WINDOW:
            # Slot 0 is visible to every row only without a window: a later row of the tile may have seen nothing
            # so far, and -inf - -inf is no number.
            b_new_max = tl.maximum(b_new_max, -1e30)
        b_weights = tl.exp(b_scores - b_new_max[:, None])
        b_decay = tl.exp(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
        b_out = b_out * b_decay[:, None] + tl.dot(b_weights.to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new_max

    b_out = b_out / tl.maximum(b_sum, 1e-30)[:, None]  # rows behind the end of the sequence may have seen nothing
    tl.store(
        out_ptr + (o_token * (K * G) + o_head)[:, None] * D + o_d[None, :],
        b_out.to(out_ptr.dtype.element_ty),
        mask=m_rd,
    )


def paged_attention_triton(
    q: Tensor,
    cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = cache.shape
    num_sequences = context_lens.shape[0]
    assert cache.is_contiguous() and q.stride(2) == 1 and block_tables.stride(1) == 1
    assert cache.shape[4] == head_dim and num_heads % num_kv_heads == 0
    group = num_heads // num_kv_heads
    is_decode = num_tokens == num_sequences
    rows = max(DECODE_ROWS if is_decode else PREFILL_ROWS, triton.next_power_of_2(group))
    tile = rows // group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens:
        _paged_attention_kernel[(num_tokens // tile + num_sequences, num_kv_heads)](
            q,
            cache,
            query_starts,
            context_lens,
            block_tables,
            out,
            scale,
            num_sequences,
            q.stride(0),
            q.stride(1),
            block_tables.stride(0),
            SLIDING_WINDOW=sliding_window or 0,
            K=num_kv_heads,
            G=group,
            B=block_size,
            D=head_dim,
            TILE=tile,
            ROWS=rows,
            BLOCK_N=BLOCK_N,
            BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        )
    return out

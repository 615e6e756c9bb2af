"""Triton kernel of rotary.py, one program per token."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    m_d = o_d < HALF
    m_hd = (o_h < NUM_HEADS)[:, None] & m_d[None, :]
    # Both halves hold the same angles; the second half of sin carries the positive sign.
    b_cos = tl.load(cos_ptr + i_t * cos_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + i_t * sin_stride + HALF + o_d, mask=m_d, other=0.0).to(tl.float32)
    first_ptr = x_ptr + i_t * token_stride + o_h[:, None] * head_stride + o_d[None, :]
    b_x1 = tl.load(first_ptr, mask=m_hd, other=0.0).to(tl.float32)
    b_x2 = tl.load(first_ptr + HALF, mask=m_hd, other=0.0).to(tl.float32)
    b_out1 = b_x1 * b_cos[None, :] - b_x2 * b_sin[None, :]
    b_out2 = b_x2 * b_cos[None, :] + b_x1 * b_sin[None, :]
    tl.store(first_ptr, b_out1.to(x_ptr.dtype.element_ty), mask=m_hd)
    tl.store(first_ptr + HALF, b_out2.to(x_ptr.dtype.element_ty), mask=m_hd)


def rotary_triton_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = x.shape
    assert x.stride(2) == cos.stride(2) == sin.stride(2) == 1
    if num_tokens:
        _rotary_kernel[(num_tokens,)](
            x,
            cos,
            sin,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            sin.stride(0),
            NUM_HEADS=num_heads,
            HALF=head_dim // 2,
            BLOCK_H=triton.next_power_of_2(num_heads),
            BLOCK_D=triton.next_power_of_2(head_dim // 2),
        )
    return x

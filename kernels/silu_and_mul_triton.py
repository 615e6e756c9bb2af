"""Triton kernel of silu_and_mul.py, one program per token and stretch of features."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_and_mul_kernel(x_ptr, out_ptr, x_stride, SIZE, BLOCK: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < SIZE
    b_gate = tl.load(x_ptr + i_t * x_stride + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.load(x_ptr + i_t * x_stride + SIZE + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(out_ptr + i_t * SIZE + o_i, b_out.to(out_ptr.dtype.element_ty), mask=m_i)


def silu_and_mul_triton(gate_up: Tensor) -> Tensor:
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.dim() == 2 and gate_up.stride(1) == 1
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(size), 1024)  # four elements for each of 256 threads
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, block))
        _silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), size, BLOCK=block)
    return out

"""Triton kernels of rms_norm.py, one program per row."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    outer_stride,
    inner_stride,
    eps,
    num_inner,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row_ptr = x_ptr + (i_row // num_inner) * outer_stride + (i_row % num_inner) * inner_stride
    b_x = tl.load(row_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_out = b_x * b_inverse * b_weight
    tl.store(out_ptr + i_row * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(x_ptr + i_row * x_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_residual = tl.load(residual_ptr + i_row * residual_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    # Rounded before the norm, so that what is normed is what the next layer adds to.
    b_total = (b_x + b_residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + i_row * D + o_d, b_total, mask=m_d)
    b_total = b_total.to(tl.float32)
    b_inverse = tl.rsqrt(tl.sum(b_total * b_total, axis=0) / D + eps)
    b_out = b_total * b_inverse * b_weight
    tl.store(out_ptr + i_row * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.unsqueeze(0) if x.dim() == 2 else x  # [outer, inner, D]
    assert rows.dim() == 3 and rows.stride(2) == 1
    size = x.shape[-1]
    num_rows = out.numel() // size
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            rows,
            weight,
            out,
            rows.stride(0),
            rows.stride(1),
            eps,
            rows.shape[1],
            D=size,
            BLOCK_D=triton.next_power_of_2(size),
        )
    return out


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.dim() == 2 and x.shape == residual.shape and x.stride(1) == residual.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    num_rows, size = x.shape
    if num_rows:
        _add_rms_norm_kernel[(num_rows,)](
            x,
            residual,
            weight,
            out,
            total,
            x.stride(0),
            residual.stride(0),
            eps,
            D=size,
            BLOCK_D=triton.next_power_of_2(size),
        )
    return out, total

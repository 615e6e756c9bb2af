"""RMS norm over the last dim in float32:  x / sqrt(mean(x²) + eps) · weight  (arXiv:1910.07467)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.linalg import vector_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normed copy of `x` [..., D] with `weight` [D], in the dtype of `x`."""
    if x.is_cuda:
        from stagemesh.kernels.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), both [T, D]; the inputs are not changed."""
    if x.is_cuda:
        from stagemesh.kernels.rms_norm_triton import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_torch(x, residual, weight, eps)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Few calls, because on a CPU they are the cost of a small batch; torch's own rms_norm makes twice as many.
    norm = vector_norm(x, 2, -1, True, dtype=torch.float32)
    inverse = torch.addcmul(_constant(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * inverse).to(x.dtype).mul_(weight)


def add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


@lru_cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)

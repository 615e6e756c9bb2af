"""The gate of a SwiGLU MLP (arXiv:2002.05202): silu(gate) · up, side by side in one tensor."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`gate_up` [T, 2·I] → [T, I]."""
    if gate_up.is_cuda:
        from stagemesh.kernels.silu_and_mul_triton import silu_and_mul_triton

        return silu_and_mul_triton(gate_up)
    return silu_and_mul_torch(gate_up)


def silu_and_mul_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate).mul_(up)

"""Rotary position embedding, the half-split form of Llama checkpoints (arXiv:2104.09864).

With x = [x1, x2]:  out = [x1·cos - x2·sin, x2·cos + x1·sin]  =  x·cos + swap_halves(x)·[-sin, sin].
"""

from __future__ import annotations

from torch import Tensor


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [T, heads, D] in place and return it; may be strided, the last dim is contiguous.

    cos, sin: [T, 1, D] in the dtype of `x`. The halves hold the same angles; the first half of `sin` is negated.
    """
    if x.is_cuda:
        from stagemesh.kernels.rotary_triton import rotary_triton_

        return rotary_triton_(x, cos, sin)
    return rotary_torch_(x, cos, sin)


def rotary_torch_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)

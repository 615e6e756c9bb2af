from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stagemesh.kernels.rotary import rotary_, rotary_torch_


def angles(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin as the kernels take them."""
    angle = torch.rand(num_tokens, 1, head_dim // 2) * 2 * math.pi
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def test_pairs_turn_by_their_angle() -> None:
    # D = 4: features 0 and 2 turn by 90 degrees, 1 and 3 by 180.
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos = torch.tensor([[[0.0, -1.0, 0.0, -1.0]]])
    sin = torch.tensor([[[-1.0, 0.0, 1.0, 0.0]]])
    assert_close(rotary_(x, cos, sin), torch.tensor([[[-3.0, -2.0, 1.0, -4.0]]]))


def test_only_the_given_heads_are_changed_in_place() -> None:
    torch.manual_seed(0)
    heads = torch.randn(3, 5, 8)
    before = heads.clone()
    rotary_(heads[:, 1:3], *angles(3, 8, torch.float32))
    assert torch.equal(heads[:, :1], before[:, :1]) and torch.equal(heads[:, 3:], before[:, 3:])
    assert_close(heads.norm(dim=-1), before.norm(dim=-1))
    assert not torch.equal(heads[:, 1:3], before[:, 1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens, num_heads, head_dim", [(0, 2, 8), (1, 1, 2), (5, 3, 20), (4, 12, 64)])
def test_triton_agrees_with_the_reference(
    triton_device: torch.device, num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    from stagemesh.kernels.rotary_triton import rotary_triton_

    torch.manual_seed(1)
    heads = torch.randn(num_tokens, num_heads + 3, head_dim).to(triton_device, dtype)
    cos, sin = (a.to(triton_device) for a in angles(num_tokens, head_dim, dtype))
    expected = heads.clone()
    rotary_torch_(expected[:, 1 : num_heads + 1], cos, sin)
    rotary_triton_(heads[:, 1 : num_heads + 1], cos, sin)
    # In bf16 the reference rounds each product, the kernel only the result; relative to vectors of length
    # about 1.
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {}
    assert_close(heads, expected, **tolerance)

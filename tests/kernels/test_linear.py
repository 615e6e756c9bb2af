from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stagemesh.kernels.linear import linear, pack_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_weight_gives_the_product_of_the_plain_one(
    num_tokens: int, with_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, 37).to(dtype), torch.randn(23, 37).to(dtype)
    bias = torch.randn(23).to(dtype) if with_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    # The sum of 37 products in another order: within one rounding of the result.
    assert_close(
        linear(x, pack_weight(weight), bias),
        expected,
        rtol=2**-7 if dtype != torch.float32 else 1e-5,
        atol=1e-4,
    )


def test_packing_leaves_the_plain_weight_alone() -> None:
    weight = torch.randn(8, 8)
    kept = weight.clone()
    pack_weight(weight)
    assert torch.equal(weight, kept)

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stagemesh.kernels.silu_and_mul import silu_and_mul, silu_and_mul_torch


def test_the_first_half_gates_the_second() -> None:
    gate, up = torch.tensor([[0.0, 1.0, -2.0]]), torch.tensor([[5.0, 2.0, 3.0]])
    expected = gate / (1 + torch.exp(-gate)) * up
    assert_close(silu_and_mul(torch.cat((gate, up), 1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens, size", [(0, 8), (1, 1), (3, 100), (5, 1500)])
def test_triton_agrees_with_the_reference(
    triton_device: torch.device, num_tokens: int, size: int, dtype: torch.dtype
) -> None:
    from stagemesh.kernels.silu_and_mul_triton import silu_and_mul_triton

    torch.manual_seed(0)
    x = torch.randn(num_tokens, 2 * size + 3).to(triton_device, dtype)[:, : 2 * size]
    # The reference rounds to bf16 twice, the kernel once.
    tolerance = {"rtol": 2**-6, "atol": 1e-5} if dtype == torch.bfloat16 else {}
    assert_close(silu_and_mul_triton(x), silu_and_mul_torch(x), **tolerance)

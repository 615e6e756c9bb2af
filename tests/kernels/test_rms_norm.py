from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stagemesh.kernels.rms_norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch

DTYPES = [torch.float32, torch.bfloat16]


def test_a_row_worked_by_hand() -> None:
    # mean(x²) = (9 + 16) / 2 = 12.5, with eps 3.5 the root is 4
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 3.5)
    assert_close(out, torch.tensor([[0.75, 2.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (5, 3, 24), (0, 8)])
def test_rms_norm_agrees_with_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)
    assert_close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5))


def test_a_row_of_zeros_stays_zero() -> None:
    assert_close(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_add_rms_norm_returns_the_sum_and_leaves_its_inputs_alone() -> None:
    torch.manual_seed(1)
    x, residual, weight = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    kept = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert_close(normed, rms_norm_torch(x + residual, weight, 1e-5))
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 128])
def test_triton_agrees_with_the_reference(triton_device: torch.device, size: int, dtype: torch.dtype) -> None:
    from stagemesh.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton

    torch.manual_seed(2)
    heads = torch.randn(5, 7, size).to(triton_device, dtype)[:, 2:5]  # strided, as query heads are
    x, residual = (torch.randn(6, size).to(triton_device, dtype) for _ in range(2))
    weight = torch.randn(size).to(triton_device, dtype)
    assert_close(rms_norm_triton(heads, weight, 1e-5), rms_norm_torch(heads, weight, 1e-5))
    assert_close(rms_norm_triton(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5))
    assert_close(add_rms_norm_triton(x, residual, weight, 1e-5), add_rms_norm_torch(x, residual, weight, 1e-5))

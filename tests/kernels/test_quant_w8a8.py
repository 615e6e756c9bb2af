from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stagemesh.kernels.quant_w8a8 import FP8, dot, fp8_values, quantize, quantize_groups, values, w8a8_linear

DTYPES = [FP8, torch.int8]
STEP = {FP8: 2**-4, torch.int8: 0.5 / 127}
"""Largest error of rounding, relative to the value for fp8 (3 bits behind the first), to the largest for int8."""


def test_every_byte_means_what_the_format_says() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    expected = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        value = float("nan") if byte & 127 == 127 else value
        expected.append(-value if byte > 127 else value)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(fp8_values(every, dtype), torch.tensor(expected, dtype=dtype), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_fit_becomes_the_largest_value(dtype: torch.dtype) -> None:
    stored = quantize(torch.tensor([1e6, -1e6, 0.0]), torch.tensor(1.0), dtype)
    limit = 448.0 if dtype == FP8 else 127.0
    assert values(stored).tolist() == [limit, -limit, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 4])
def test_each_group_uses_the_whole_range(dtype: torch.dtype, groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 32) * torch.logspace(-3, 3, 32)
    stored, scale = quantize_groups(x, groups, dtype)
    assert (stored.shape, stored.dtype, scale.shape) == (x.shape, dtype, (5, groups))
    back = (values(stored).unflatten(1, (groups, -1)) * scale[:, :, None]).flatten(1)
    largest = x.unflatten(1, (groups, -1)).abs().amax(2).repeat_interleave(32 // groups, 1)
    # fp8 values below 2**-6 have fewer bits: an error of at most 2**-10 of a scale.
    allowed = (x.abs() if dtype == FP8 else largest) * STEP[dtype] * 1.001 + largest / 448 * 2**-10
    assert ((back - x).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zeros(dtype: torch.dtype) -> None:
    weight, scale = quantize_groups(torch.zeros(3, 16), 1, dtype)
    assert torch.equal(w8a8_linear(torch.zeros(2, 16), weight, scale), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "static"), [(1, False), (3, False), (1, True)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_the_product_is_that_of_the_dequantized_numbers(
    dtype: torch.dtype, groups: int, static: bool, num_tokens: int
) -> None:
    torch.manual_seed(1)
    x = torch.randn(num_tokens, 48)
    weight, weight_scale = quantize_groups(torch.randn(10, 48), groups, dtype)
    if static:
        input_scale = torch.tensor(0.02)
        stored, scale = quantize(x, input_scale, dtype), input_scale.expand(num_tokens, 1)
    else:
        input_scale = None
        stored, scale = quantize_groups(x, groups, dtype)
    a = values(stored).double().unflatten(1, (groups, -1)) * scale[:, :, None]
    b = values(weight).double().unflatten(1, (groups, -1)) * weight_scale[:, :, None]
    expected = a.flatten(1) @ b.flatten(1).T
    assert_close(w8a8_linear(x, weight, weight_scale, input_scale), expected.float(), rtol=1e-4, atol=1e-4)


def test_int8_products_are_exact_however_long() -> None:
    x, weight = torch.full((2, 4096), 127, dtype=torch.int8), torch.full((3, 4096), 127, dtype=torch.int8)
    weight[:, 0] = 126
    assert torch.equal(dot(x, weight), torch.full((2, 3), float(127 * 127 * 4096 - 127)))

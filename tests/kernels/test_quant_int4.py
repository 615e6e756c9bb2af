from __future__ import annotations

import torch
from torch.testing import assert_close

from stagemesh.kernels.quant_int4 import (
    AWQ_ORDER,
    dequantize_int4,
    int4_linear,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
)

DIGITS = torch.arange(8, dtype=torch.uint8)


def word(hexadecimal: int) -> torch.Tensor:
    return torch.tensor([[hexadecimal]], dtype=torch.int64).to(torch.int32)


def test_known_words() -> None:
    # Written by hand from the formats: the lowest nibble comes first, AWQ puts even features before odd ones.
    assert torch.equal(pack_columns(DIGITS[None]), word(0x76543210))
    assert torch.equal(pack_columns(DIGITS[None], AWQ_ORDER), word(0x75316420))
    assert torch.equal(pack_rows(DIGITS[:, None]), word(0x76543210))
    assert torch.equal(unpack_columns(word(0x76543210)), DIGITS[None])
    assert torch.equal(unpack_columns(word(0x75316420), AWQ_ORDER), DIGITS[None])
    assert torch.equal(unpack_rows(word(0x76543210)), DIGITS[:, None])


def test_a_word_whose_top_value_is_above_7_is_negative() -> None:
    row = (15 - DIGITS)[None]
    assert torch.equal(pack_columns(row), torch.tensor([[0x89ABCDEF - 2**32]], dtype=torch.int32))
    assert torch.equal(unpack_columns(pack_columns(row)), row)


def test_packing_and_unpacking_are_inverse() -> None:
    torch.manual_seed(0)
    stored = torch.randint(0, 16, (24, 40), dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_rows(stored)), stored)
    for order in (tuple(range(8)), AWQ_ORDER):
        assert torch.equal(unpack_columns(pack_columns(stored, order), order), stored)


def test_each_input_is_scaled_by_its_group() -> None:
    torch.manual_seed(0)
    stored = torch.randint(0, 16, (16, 5), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (3, 5), dtype=torch.uint8)
    scales, groups = torch.rand(3, 5), torch.randint(0, 3, (13,))
    expected = torch.empty(13, 5)
    for i in range(13):
        for o in range(5):
            group = int(groups[i])
            expected[i, o] = (int(stored[i, o]) - int(zeros[group, o])) * scales[group, o]
    packed = pack_rows(stored)
    assert_close(dequantize_int4(packed, scales, zeros, groups), expected)
    x = torch.randn(4, 13)
    assert_close(int4_linear(x, packed, scales, zeros, groups), x @ expected)
    assert int4_linear(x.bfloat16(), packed, scales, zeros, groups).dtype == torch.bfloat16

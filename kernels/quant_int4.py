"""Linear layers with weights of 4 bits in groups: value = (stored - zero) · scale.

Eight values share an int32, value i at bits 4·i:

- AWQ (AutoAWQ's GEMM version) packs output features, interleaved: bits 4·i hold feature AWQ_ORDER[i].
- GPTQ packs input features in order, as `int4_linear` takes them; its zeros pack output features in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_columns(words: Tensor, order: tuple[int, ...] = tuple(range(PER_WORD))) -> Tensor:
    """int32 [r, c] → uint8 [r, 8·c]: bits 4·i of a word are its column order[i]."""
    nibbles = (words[:, :, None] >> _shifts(words.device)) & 15
    back = sorted(range(PER_WORD), key=order.__getitem__)
    return nibbles[:, :, back].flatten(1).to(torch.uint8)


def pack_columns(values: Tensor, order: tuple[int, ...] = tuple(range(PER_WORD))) -> Tensor:
    """The inverse of unpack_columns."""
    nibbles = values.unflatten(1, (-1, PER_WORD))[:, :, list(order)].int()
    # The top nibble of a word is its sign: sums of shifted values wrap around as they should.
    return (nibbles << _shifts(values.device)).sum(2, dtype=torch.int32)


def unpack_rows(words: Tensor) -> Tensor:
    """int32 [r, c] → uint8 [8·r, c]: bits 4·i of a word are its row i."""
    nibbles = (words[:, None] >> _shifts(words.device)[:, None]) & 15
    return nibbles.flatten(0, 1).to(torch.uint8)


def pack_rows(values: Tensor) -> Tensor:
    """The inverse of unpack_rows."""
    nibbles = values.unflatten(0, (-1, PER_WORD)).int()
    return (nibbles << _shifts(values.device)[:, None]).sum(1, dtype=torch.int32)


def int4_linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """x [T, in] → [T, out] in the dtype of `x`.

    weight: int32 [ceil(in / 8), out] as from pack_rows; rows past `in` do not matter.
    scales: float32 [G, out]. zeros: uint8 [G, out]. groups: int64 [in], the group of each input feature.
    """
    return x @ dequantize_int4(weight, scales, zeros, groups).to(x.dtype)


def dequantize_int4(weight: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """float32 [in, out] of int4_linear's weights."""
    stored = unpack_rows(weight)[: groups.shape[0]].float()
    return stored.sub_(zeros.float()[groups]).mul_(scales[groups])


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 4 * PER_WORD, 4, dtype=torch.int32, device=device)

"""Rounding a weight matrix to 4 bits so that the layer's output changes least.

The output's error is Σ ‖E·x‖² = tr(E·H·Eᵀ), E the weights' error, H = Σ x·xᵀ. Weights are [out, in], groups along `in`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15
"""Largest 4-bit value."""
SCALE_STEPS = 20
"""Exponents in [0, 1) tried for AWQ's scales."""
SHRINKS = tuple(1 - 0.05 * i for i in range(9))
"""Shares of a group's range tried: clipping refines the rest."""
DAMPING = 0.01
"""GPTQ's addend to the diagonal of H, relative to its mean."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """value[o, i] = (stored[o, i] - zeros[o, groups[i]]) · scales[o, groups[i]]."""

    stored: Tensor
    """uint8 [out, in]."""
    zeros: Tensor
    """uint8 [out, G]."""
    scales: Tensor
    """float16 [out, G]."""
    groups: Tensor
    """int64 [in]."""

    def values(self) -> Tensor:
        zeros, scales = self.zeros.float()[:, self.groups], self.scales.float()[:, self.groups]
        return (self.stored.float() - zeros) * scales


def output_error(difference: Tensor, moment: Tensor) -> float:
    """tr(E·H·Eᵀ). difference: [out, in], moment: H [in, in]."""
    return float((difference @ moment * difference).sum())


# -- AWQ: zero point and scale per group ---------------------------------------------------------------------


def round_awq(weight: Tensor, group_size: int, moment: Tensor | None = None) -> Rounded:
    """Round to nearest. With `moment` (H), groups are clipped where that lowers the error."""
    grouped = weight.unflatten(1, (-1, group_size))
    groups = torch.arange(weight.shape[1], device=weight.device) // group_size
    best = _awq_grid(grouped, 1.0)
    if moment is not None:
        # The blocks of H on its diagonal: what groups have to do with one another is left out.
        starts = range(0, weight.shape[1], group_size)
        blocks = torch.stack([moment[a : a + group_size, a : a + group_size] for a in starts])
        lowest = _group_errors(grouped, *best, blocks)
        for shrink in SHRINKS[1:]:
            tried = _awq_grid(grouped, shrink)
            errors = _group_errors(grouped, *tried, blocks)
            better = errors < lowest
            lowest = torch.where(better, errors, lowest)
            best = (torch.where(better, tried[0], best[0]), torch.where(better, tried[1], best[1]))
    scales, zeros = best
    stored = _store(grouped, scales, zeros).flatten(1)
    return Rounded(stored.to(torch.uint8), zeros.to(torch.uint8), scales.half(), groups)


def _awq_grid(grouped: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Scales (float16 values) and zeros, [out, G]."""
    low, high = grouped.amin(2).clamp(max=0) * shrink, grouped.amax(2).clamp(min=0) * shrink
    scales = ((high - low).clamp(min=1e-4) / LEVELS).half().float()
    return scales, (-low / scales).round().clamp(0, LEVELS)


def _store(grouped: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (grouped / scales[:, :, None]).round().add_(zeros[:, :, None]).clamp_(0, LEVELS)


def _group_errors(grouped: Tensor, scales: Tensor, zeros: Tensor, blocks: Tensor) -> Tensor:
    """[out, G]: the error by each group alone. blocks: [G, group_size, group_size]."""
    back = (_store(grouped, scales, zeros) - zeros[:, :, None]) * scales[:, :, None]
    difference = (back - grouped).transpose(0, 1)  # [G, out, group_size]
    return (torch.bmm(difference, blocks) * difference).sum(2).T


def search_input_scales(weights: Sequence[Tensor], magnitude: Tensor, moment: Tensor, group_size: int) -> Tensor:
    """AWQ's factors [in] for weights that share an input, which is divided by them (arXiv:2306.00978, 3.2).

    A power of `magnitude` [in], the mean |x|; the best exponent tried, 0 included.
    """
    best, lowest = torch.ones_like(magnitude), float("inf")
    for step in range(SCALE_STEPS):
        factors = magnitude.clamp(min=1e-4) ** (step / SCALE_STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = sum(output_error(round_awq(w * factors, group_size).values() / factors - w, moment) for w in weights)
        if error < lowest:
            best, lowest = factors, error
    return best


# -- GPTQ: one input after the other, the rest makes up for the error ----------------------------------------


def round_gptq(weight: Tensor, moment: Tensor, group_size: int, act_order: bool = False) -> Rounded:
    """arXiv:2210.17323 with symmetric groups (zero 8). act_order: inputs are rounded and grouped by falling H[i, i]."""
    inputs = weight.shape[1]
    diagonal = moment.diagonal()
    order = diagonal.argsort(descending=True) if act_order else torch.arange(inputs, device=weight.device)
    work = weight[:, order].clone()
    moment = moment[order][:, order].clone()
    # Inputs that were always 0 say nothing; 1 keeps H regular.
    moment.diagonal().add_(DAMPING * diagonal.mean() + (moment.diagonal() == 0))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)

    stored, scales = torch.empty_like(work), []
    for start in range(0, inputs, group_size):
        end = start + group_size
        block, upper = work[:, start:end].clone(), inverse[start:end, start:end]
        scale = _symmetric_scale(block, moment.diagonal()[start:end])
        errors = torch.empty_like(block)
        for i in range(group_size):
            column = block[:, i]
            stored[:, start + i] = (column / scale).round().add_(8).clamp_(0, LEVELS)
            errors[:, i] = (column - (stored[:, start + i] - 8) * scale) / upper[i, i]
            block[:, i:] -= errors[:, i : i + 1] * upper[i, i:]
        work[:, end:] -= errors @ inverse[start:end, end:]
        scales.append(scale)

    back = order.argsort()
    groups = (torch.arange(inputs, device=weight.device) // group_size)[back]
    scale = torch.stack(scales, 1)
    zeros = torch.full_like(scale, 8, dtype=torch.uint8)
    return Rounded(stored[:, back].to(torch.uint8), zeros, scale.half(), groups)


def _symmetric_scale(block: Tensor, importance: Tensor) -> Tensor:
    """Scales [out] of least error. block: [out, group_size], importance: [group_size]."""
    largest = block.abs().amax(1).clamp(min=1e-4)
    best, lowest = largest, torch.full_like(largest, float("inf"))
    for shrink in SHRINKS:
        scale = (largest * shrink * 2 / LEVELS).half().float()
        back = ((block / scale[:, None]).round() + 8).clamp(0, LEVELS).sub(8) * scale[:, None]
        error = ((back - block) ** 2 * importance).sum(1)
        best = torch.where(error < lowest, scale, best)
        lowest = torch.minimum(error, lowest)
    return best

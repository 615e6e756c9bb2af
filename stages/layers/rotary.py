"""Rotary position angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagemesh.config.rope import RopeConfig


class RotaryTable:
    """cos and sin of positions below `max_positions`, for kernels/rotary.py."""

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, head_dim, max_positions))
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
        self._table = table.unsqueeze(2).to(device, dtype)  # [max_positions, 2, 1, D]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] → cos and signed sin, both [T, 1, D]."""
        cos, sin = self._table.index_select(0, positions).unbind(1)
        return cos, sin


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_positions: int) -> Tensor:
    """float32 [head_dim / 2]: radians per position of each pair of features.

    "dynamic" follows `max_positions`, not the current length: keys in the cache are rotated once.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "dynamic":
            return 1.0 / _dynamic_theta(rope, head_dim, max_positions) ** exponents
        case "llama3":
            return _llama3(frequencies, rope)
        case "yarn":
            return _yarn(frequencies, rope, head_dim)
    raise NotImplementedError(f"RoPE kind {rope.kind}")


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's scaling: wavelengths above original_max_position_embeddings / low_freq_factor are stretched, those
    below original_max_position_embeddings / high_freq_factor kept, others blended.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _dynamic_theta(rope: RopeConfig, head_dim: int, max_positions: int) -> float:
    """NTK-aware scaling: the longest wavelength grows with the context."""
    growth = max(1.0, max_positions / rope.original_max_position_embeddings)
    return float(rope.theta * (rope.factor * growth - (rope.factor - 1)) ** (head_dim / (head_dim - 2)))


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv:2309.00071, 3.2): features with more than beta_fast turns in the original positions are kept, those
    with fewer than beta_slow stretched, others blended linearly by index.
    """

    def index_of(turns: float) -> float:
        """The (fractional) feature pair with so many turns."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step, not a division by zero
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return frequencies * (1 - stretch + stretch / rope.factor)

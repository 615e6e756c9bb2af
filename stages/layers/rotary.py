"""Rotary position angles: one table per model, looked up once per step for all layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stagemesh.config.model import RopeConfig


class RotaryTable:
    """cos and sin of every position below `max_positions`, in the form that kernels/rotary.py takes."""

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
        self._table = table.unsqueeze(2).to(device, dtype)  # [max_positions, 2, 1, D]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] → cos and signed sin, both [T, 1, D]."""
        cos, sin = self._table.index_select(0, positions).unbind(1)
        return cos, sin


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians per position of each pair of features."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(frequencies, rope)
    raise NotImplementedError(f"RoPE kind {rope.kind}")


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, others blended.

    The bounds are original_max_position_embeddings over low_freq_factor and over high_freq_factor.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)

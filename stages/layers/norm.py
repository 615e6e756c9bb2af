"""RMS norm, whole on every rank."""

from __future__ import annotations

from torch import Tensor

from stagemesh.kernels.rms_norm import add_rms_norm, rms_norm
from stagemesh.stages.layers.checkpoint import Checkpoint


class RMSNorm:
    def __init__(self, name: str, size: int, eps: float) -> None:
        self.name = name
        self.size = size
        self.eps = eps
        self.weight: Tensor

    def load(self, checkpoint: Checkpoint) -> None:
        self.weight = checkpoint.read(f"{self.name}.weight", (self.size,))

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return add_rms_norm(x, residual, self.weight, self.eps)

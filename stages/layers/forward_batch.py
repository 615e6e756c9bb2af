"""What all layers share in one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q [T, H, D], kv [T, 2·K, D], cache, scale) → [T, H·D]; stores kv in the cache first."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens, on the rank's device. Valid until the next is made."""

    token_ids: Tensor
    """int64 [T]."""
    cos: Tensor
    """[T, 1, D], as kernels/rotary.py takes them; `sin` likewise."""
    sin: Tensor
    attend: Attend

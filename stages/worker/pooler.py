"""Hidden states of a whole prompt → one vector, however the prompt is cut into steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stagemesh.stages.messages.step import PoolSpec, StepPlan

MAX_SUMS = 4096
"""Running sums, far more than sequences run: the oldest beyond are of aborted requests."""


class Pooler:
    """Keeps a running sum of each unfinished prompt that is pooled by its mean. Last stage, tp rank 0."""

    def __init__(self) -> None:
        self._sums: OrderedDict[int, Tensor] = OrderedDict()

    def pool(self, plan: StepPlan, hidden: Tensor, norm: Callable[[Tensor], Tensor]) -> list[bytes]:
        """float32: one vector for each PoolSpec of the plan whose prompt ends in this step; empty if it is not finite.

        hidden: [T, hidden], before the model's final `norm`.
        """
        query_lens = np.frombuffer(plan.query_lens, np.int32)
        context_lens = np.frombuffer(plan.context_lens, np.int32)
        ends = np.cumsum(query_lens)
        vectors = []
        for spec in plan.pools:
            end, length, before = (int(a[spec.sequence]) for a in (ends, query_lens, context_lens))
            if spec.pooling == "last":
                pooled = norm(hidden[end - 1 : end])[0].float() if spec.is_whole else None
            else:
                total = self._add(plan.seq_ids[spec.sequence], before, norm(hidden[end - length : end]).float().sum(0))
                pooled = total / (before + length) if spec.is_whole else None
            if pooled is not None:
                self._sums.pop(plan.seq_ids[spec.sequence], None)
                vector = _finish(pooled, spec).cpu().numpy()
                vectors.append(vector.tobytes() if np.isfinite(vector).all() else b"")
        return vectors

    def _add(self, seq_id: int, num_before: int, part: Tensor) -> Tensor:
        # A prompt that begins again, after a preemption, is counted from nothing.
        total = part if num_before == 0 else self._sums[seq_id] + part
        self._sums[seq_id] = total
        self._sums.move_to_end(seq_id)
        if len(self._sums) > MAX_SUMS:
            self._sums.popitem(last=False)
        return total


def _finish(pooled: Tensor, spec: PoolSpec) -> Tensor:
    if spec.dimensions:
        pooled = pooled[: spec.dimensions]
    return torch.nn.functional.normalize(pooled, dim=0) if spec.normalize else pooled

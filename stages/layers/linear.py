"""Linear layers, cut over the ranks of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stagemesh.kernels.linear import linear, pack_weight
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.tensor_parallel import TensorShard


@dataclass(frozen=True)
class WeightShard:
    """A rank's part of matrix `name` [out_features, in_features]."""

    name: str
    """Without `.weight` or `.bias`."""
    out_features: int
    in_features: int
    rows: slice
    """Output features."""
    columns: slice
    """Input features."""


class LinearMethod(Protocol):
    """Reads and applies a layer's parts, stacked along the output, in the checkpoint's format."""

    def load(self, checkpoint: Checkpoint, parts: Sequence[WeightShard], with_bias: bool) -> None: ...

    def dequantize(self) -> Tensor:
        """Float weights [rows of all parts, columns]."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, columns] → [T, rows of all parts]."""


class DenseMethod:
    """Float weights [out, in]."""

    weight: Tensor
    bias: Tensor | None = None

    def load(self, checkpoint: Checkpoint, parts: Sequence[WeightShard], with_bias: bool) -> None:
        self.weight = pack_weight(read_weight(checkpoint, parts))
        self.bias = read_bias(checkpoint, parts) if with_bias else None

    def dequantize(self) -> Tensor:
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def read_weight(checkpoint: Checkpoint, parts: Sequence[WeightShard], dtype: torch.dtype | None = None) -> Tensor:
    """[rows of all parts, columns]."""
    reads = [(f"{p.name}.weight", (p.out_features, p.in_features), (p.rows, p.columns)) for p in parts]
    return checkpoint.stack(reads, dtype)


def read_bias(checkpoint: Checkpoint, parts: Sequence[WeightShard]) -> Tensor:
    return checkpoint.stack([(f"{p.name}.bias", (p.out_features,), (p.rows,)) for p in parts])


LinearMethodFactory = Callable[[str], LinearMethod]
"""By a layer's name (`model.layers.0.self_attn.o_proj`): formats leave some layers dense."""


def dense_method(name: str) -> LinearMethod:
    return DenseMethod()


@dataclass(frozen=True)
class OutputShard:
    """One checkpoint matrix of a column-parallel layer."""

    name: str
    out_features: int
    rows: Sequence[slice]
    """Rows of this rank in stacking order."""


class ColumnParallelLinear:
    """Each rank computes some outputs of matrices that share an input."""

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[OutputShard],
        *,
        bias: bool,
        make_method: LinearMethodFactory = dense_method,
    ) -> None:
        self.bias = bias
        self.method = make_method(outputs[0].name)
        every = slice(0, in_features)
        self.parts = [WeightShard(o.name, o.out_features, in_features, rows, every) for o in outputs for rows in o.rows]

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint, self.parts, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x)


class RowParallelLinear:
    """Each rank multiplies its part of the inputs; the sum is on every rank."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        tp: TensorShard,
        make_method: LinearMethodFactory = dense_method,
    ) -> None:
        self.bias = bias and tp.rank == 0  # added once, then summed
        self.tp = tp
        self.method = make_method(name)
        columns = shard_slice(in_features, tp)
        self.parts = [WeightShard(name, out_features, in_features, slice(0, out_features), columns)]

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint, self.parts, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.tp.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's summand of the output."""
        return self.method(x)


def shard_slice(features: int, tp: TensorShard) -> slice:
    """This rank's equal part of `features`."""
    assert features % tp.size == 0, f"{features} features over {tp.size} ranks"
    part = features // tp.size
    return slice(tp.rank * part, (tp.rank + 1) * part)

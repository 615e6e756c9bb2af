"""The gated MLP, cut along its intermediate features."""

from __future__ import annotations

from torch import Tensor

from stagemesh.kernels.silu_and_mul import silu_and_mul
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.linear import (
    ColumnParallelLinear,
    LinearMethodFactory,
    OutputShard,
    RowParallelLinear,
    dense_method,
    shard_slice,
)
from stagemesh.stages.layers.tensor_parallel import TensorShard


class GatedMLP:
    """down(silu(gate(x)) · up(x)), gate and up from one product."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        intermediate_size: int,
        tp: TensorShard,
        *,
        bias: bool,
        make_method: LinearMethodFactory = dense_method,
        projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        gate, up, down = projections
        rows = [shard_slice(intermediate_size, tp)]
        self.gate_up = ColumnParallelLinear(
            hidden_size,
            [
                OutputShard(f"{name}.{gate}", intermediate_size, rows),
                OutputShard(f"{name}.{up}", intermediate_size, rows),
            ],
            bias=bias,
            make_method=make_method,
        )
        self.down = RowParallelLinear(
            f"{name}.{down}", intermediate_size, hidden_size, bias=bias, tp=tp, make_method=make_method
        )

    def load(self, checkpoint: Checkpoint) -> None:
        self.gate_up.load(checkpoint)
        self.down.load(checkpoint)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down(silu_and_mul(self.gate_up(x)))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's summand of the output."""
        return self.down.partial(silu_and_mul(self.gate_up(x)))

"""Grouped-query self-attention, cut by heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import kv_heads
from stagemesh.kernels.rotary import rotary_
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.forward_batch import ForwardBatch
from stagemesh.stages.layers.linear import (
    ColumnParallelLinear,
    LinearMethodFactory,
    OutputShard,
    RowParallelLinear,
    dense_method,
    shard_slice,
)
from stagemesh.stages.layers.norm import RMSNorm
from stagemesh.stages.layers.tensor_parallel import TensorShard


class Attention:
    """q, k, v from one product, optional norms per head, rotary positions, paged attention."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tp: TensorShard,
        *,
        make_method: LinearMethodFactory = dense_method,
    ) -> None:
        dim = config.head_dim
        local_kv_heads = kv_heads(config, tp.size, tp.rank)
        self.num_heads = config.num_heads // tp.size
        self.num_kv_heads = len(local_kv_heads)
        self.head_dim = dim
        self.scale = dim**-0.5
        q_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
        kv_rows = _rows_of(local_kv_heads, dim)
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            [
                OutputShard(f"{name}.q_proj", q_size, [shard_slice(q_size, tp)]),
                OutputShard(f"{name}.k_proj", kv_size, kv_rows),
                OutputShard(f"{name}.v_proj", kv_size, kv_rows),
            ],
            bias=config.qkv_bias,
            make_method=make_method,
        )
        self.q_norm = RMSNorm(f"{name}.q_norm", dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", dim, config.rms_norm_eps) if config.qk_norm else None
        self.out = RowParallelLinear(
            f"{name}.o_proj", q_size, config.hidden_size, bias=config.output_bias, tp=tp, make_method=make_method
        )

    def load(self, checkpoint: Checkpoint) -> None:
        self.qkv.load(checkpoint)
        if self.q_norm and self.k_norm:
            self.q_norm.load(checkpoint)
            self.k_norm.load(checkpoint)
        self.out.load(checkpoint)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]. New keys and values go to `cache` [N, 2, K, B, D]."""
        heads = self.num_heads
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [T, H + 2·K, D]
        if self.q_norm and self.k_norm:
            qkv[:, :heads] = self.q_norm(qkv[:, :heads])
            keys = slice(heads, heads + self.num_kv_heads)
            qkv[:, keys] = self.k_norm(qkv[:, keys])
        rotary_(qkv[:, : heads + self.num_kv_heads], batch.cos, batch.sin)
        return self.out(batch.attend(qkv[:, :heads], qkv[:, heads:], cache, self.scale))


def _rows_of(heads: Sequence[int], dim: int) -> list[slice]:
    """Rows of `heads`, neighbours in one slice."""
    rows: list[slice] = []
    for head in heads:
        if rows and rows[-1].stop == head * dim:
            rows[-1] = slice(rows[-1].start, (head + 1) * dim)
        else:
            rows.append(slice(head * dim, (head + 1) * dim))
    return rows

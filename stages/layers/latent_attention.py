"""Multi-head latent attention (arXiv:2405.04434): the cache holds latents; keys and values are their projections."""

from __future__ import annotations

import torch
from torch import Tensor

from stagemesh.config.model import ModelConfig
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

NORM_EPS = 1e-6
"""Of the norms on latents, whatever rms_norm_eps says."""


class LatentAttention:
    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tp: TensorShard,
        *,
        make_method: LinearMethodFactory = dense_method,
    ) -> None:
        assert config.mla is not None
        self.mla = mla = config.mla
        hidden_size, num_heads, bias = config.hidden_size, config.num_heads, config.output_bias
        self.num_heads = num_heads // tp.size
        self.query_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim

        def linear(part: str, width: int, features: int, *, cut: bool, bias: bool = False) -> ColumnParallelLinear:
            rows = shard_slice(features, tp) if cut else slice(0, features)
            output = OutputShard(f"{name}.{part}", features, [rows])
            return ColumnParallelLinear(width, [output], bias=bias, make_method=make_method)

        query_features = num_heads * self.query_dim
        self.query_latent, self.query_norm = None, None
        if mla.q_lora_rank is None:
            self.query = linear("q_proj", hidden_size, query_features, cut=True)
        else:
            self.query_latent = linear("q_a_proj", hidden_size, mla.q_lora_rank, cut=False, bias=bias)
            self.query_norm = RMSNorm(f"{name}.q_a_layernorm", mla.q_lora_rank, NORM_EPS)
            self.query = linear("q_b_proj", mla.q_lora_rank, query_features, cut=True)
        latent_features = mla.kv_lora_rank + mla.qk_rope_head_dim
        self.latent = linear("kv_a_proj_with_mqa", hidden_size, latent_features, cut=False, bias=bias)
        self.latent_norm = RMSNorm(f"{name}.kv_a_layernorm", mla.kv_lora_rank, NORM_EPS)
        key_and_value_features = num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.expand = linear("kv_b_proj", mla.kv_lora_rank, key_and_value_features, cut=True)
        self.key: Tensor
        """W_k of each head, [H, qk_nope_head_dim, kv_lora_rank]."""
        self.value: Tensor
        """W_vᵀ of each head, [H, kv_lora_rank, v_head_dim]."""
        self.out = RowParallelLinear(
            f"{name}.o_proj", num_heads * mla.v_head_dim, hidden_size, bias=bias, tp=tp, make_method=make_method
        )

    def load(self, checkpoint: Checkpoint) -> None:
        if self.query_latent and self.query_norm:
            self.query_latent.load(checkpoint)
            self.query_norm.load(checkpoint)
        self.query.load(checkpoint)
        self.latent.load(checkpoint)
        self.latent_norm.load(checkpoint)
        self.expand.load(checkpoint)
        self.out.load(checkpoint)
        by_head = self.expand.method.dequantize().to(self.latent_norm.weight.dtype).unflatten(0, (self.num_heads, -1))
        key, value = by_head.split([self.mla.qk_nope_head_dim, self.mla.v_head_dim], 1)
        self.key, self.value = key.contiguous(), value.transpose(1, 2).contiguous()
        del self.expand

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]. New latents go to `cache` [N, 1, 1, B, kv_lora_rank + rope]."""
        mla, num_tokens = self.mla, len(x)
        hidden = self.query_norm(self.query_latent(x)) if self.query_latent and self.query_norm else x
        query = self.query(hidden).view(num_tokens, self.num_heads, self.query_dim)
        plain, turning = query.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], -1)
        latent, shared_key = self.latent(x).split([mla.kv_lora_rank, mla.qk_rope_head_dim], -1)

        turned = self._halves(torch.cat((turning, shared_key[:, None]), 1))
        rotary_(turned, batch.cos, batch.sin)
        query = torch.cat((torch.bmm(plain.transpose(0, 1), self.key).transpose(0, 1), turned[:, :-1]), -1)
        kv = torch.cat((self.latent_norm(latent)[:, None], turned[:, -1:]), -1)
        attended = batch.attend(query, kv, cache, mla.scale).view(query.shape)[..., : mla.kv_lora_rank]
        return self.out(torch.bmm(attended.transpose(0, 1), self.value).transpose(0, 1).flatten(1))

    def _halves(self, x: Tensor) -> Tensor:
        """Rotary pairs half the dim apart: the same order for queries and keys."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.mla.rope_interleave else x

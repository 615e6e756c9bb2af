"""Qwen2: Llama with a bias on q, k and v. Qwen3: with a norm per head of q and k. Either with experts, Qwen2 with a
shared one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from stagemesh.config.model import ModelConfig, MoeConfig, MoeNames
from stagemesh.stages.models.llama import Llama


class Qwen2(Llama):
    qkv_bias: bool = True

    def resolve(self) -> ModelConfig:
        return replace(super().resolve(), qkv_bias=self.qkv_bias, output_bias=False)


class Qwen3(Llama):
    def resolve(self) -> ModelConfig:
        return replace(super().resolve(), qk_norm=True)


class QwenMoe(Llama):
    expert_names: ClassVar[MoeNames] = MoeNames(
        router="mlp.gate",
        expert="mlp.experts.{}",
        shared_expert="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
    )

    num_experts: int | None = Field(default=None, ge=1)
    num_local_experts: int | None = Field(default=None, ge=1)
    """num_experts in transformers 5."""
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(default=1, ge=1)
    mlp_only_layers: list[int] | None = None

    def resolve(self) -> ModelConfig:
        dense, step = self.mlp_only_layers or [], self.decoder_sparse_step
        moe = MoeConfig(
            num_experts=self.num_experts or self.required("num_local_experts"),
            top_k=self.required("num_experts_per_tok"),
            intermediate_size=self.required("moe_intermediate_size"),
            norm_topk_prob=self.norm_topk_prob,
            shared_intermediate_size=0,
            layers=frozenset(i for i in range(self.num_hidden_layers) if i not in dense and (i + 1) % step == 0),
        )
        return replace(super().resolve(), moe=moe)


class Qwen2Moe(QwenMoe, Qwen2):
    shared_expert_intermediate_size: int | None = Field(default=None, ge=1)

    def resolve(self) -> ModelConfig:
        config = super().resolve()
        assert config.moe is not None
        width = self.required("shared_expert_intermediate_size")
        return replace(config, moe=replace(config.moe, shared_intermediate_size=width, shared_gate=True))


class Qwen3Moe(QwenMoe, Qwen3):
    pass

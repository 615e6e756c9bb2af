"""Mistral: Llama with a sliding window. Mixtral: with experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from stagemesh.config.model import ModelConfig, MoeConfig, MoeNames
from stagemesh.stages.models.llama import Llama


class Mistral(Llama):
    sliding_window: int | None = Field(default=4096, ge=0)  # what transformers takes it for

    def resolve(self) -> ModelConfig:
        return replace(super().resolve(), sliding_window=self.sliding_window or None)


class Mixtral(Mistral):
    default_rope_theta = 1e6
    expert_names: ClassVar[MoeNames] = MoeNames(
        router="block_sparse_moe.gate", expert="block_sparse_moe.experts.{}", projections=("w1", "w3", "w2")
    )

    sliding_window: int | None = Field(default=None, ge=0)
    num_local_experts: int | None = Field(default=None, ge=1)
    num_experts_per_tok: int | None = Field(default=None, ge=1)

    def resolve(self) -> ModelConfig:
        moe = MoeConfig(
            num_experts=self.required("num_local_experts"),
            top_k=self.required("num_experts_per_tok"),
            intermediate_size=self.intermediate_size,
            norm_topk_prob=True,
            shared_intermediate_size=0,
            layers=frozenset(range(self.num_hidden_layers)),
        )
        return replace(super().resolve(), moe=moe)

"""Families whose MLP is a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE. They differ in names alone; which
layers are mixtures, and how, is in ModelConfig.
"""

from __future__ import annotations

import re

from stagemesh.stages.layers.moe import MoE, MoENames
from stagemesh.stages.models.decoder import FeedForward
from stagemesh.stages.models.llama import LlamaForCausalLM


class MixtureForCausalLM(LlamaForCausalLM):
    names: MoENames

    def make_feed_forward(self, index: int, name: str) -> FeedForward:
        moe = self.config.moe
        assert moe is not None
        if index not in moe.layers:
            return super().make_feed_forward(index, name)
        return MoE(
            name,
            self.names,
            moe,
            self.config.hidden_size,
            self.tp,
            expert_parallel=self.expert_parallel,
            make_method=self.make_method,
        )

    def _is_elsewhere(self, name: str) -> bool:
        """Experts of other ranks count too."""
        expert = re.match(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.", name)
        moe = self.config.moe
        if expert and moe and self.expert_parallel and int(expert[1]) in moe.layers:
            return int(expert[2]) < moe.num_experts
        return super()._is_elsewhere(name)


class MixtralForCausalLM(MixtureForCausalLM):
    names = MoENames(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}",
        projections=("w1", "w3", "w2"),
    )


class QwenMoeForCausalLM(MixtureForCausalLM):
    names = MoENames(
        router="mlp.gate",
        expert="mlp.experts.{}",
        projections=("gate_proj", "up_proj", "down_proj"),
        shared_expert="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
    )

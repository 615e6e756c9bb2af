"""Llama 2, 3.x and everything that kept their layer: Mistral (a sliding window), Qwen2 (a bias on q, k and v),
Qwen3 (a norm on every query and key head). The differences are all in ModelConfig.
"""

from __future__ import annotations

from stagemesh.stages.layers.attention import Attention
from stagemesh.stages.layers.mlp import GatedMLP
from stagemesh.stages.layers.norm import RMSNorm
from stagemesh.stages.models.decoder import CausalLM, DecoderLayer, FeedForward


class LlamaForCausalLM(CausalLM):
    def make_layer(self, index: int) -> DecoderLayer:
        config, name = self.config, f"model.layers.{index}"
        return DecoderLayer(
            RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps),
            Attention(f"{name}.self_attn", config, self.tp, make_method=self.make_method),
            RMSNorm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
            self.make_feed_forward(index, name),
        )

    def make_feed_forward(self, index: int, name: str) -> FeedForward:
        """What follows the attention of layer `index`, whose tensors begin with `name`."""
        config = self.config
        return GatedMLP(
            f"{name}.mlp",
            config.hidden_size,
            config.intermediate_size,
            self.tp,
            bias=config.mlp_bias,
            make_method=self.make_method,
        )

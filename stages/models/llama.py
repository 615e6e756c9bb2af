"""Llama 2, 3.x and everything that kept their layer."""

from __future__ import annotations

from stagemesh.stages.layers.attention import Attention
from stagemesh.stages.layers.decoder import DecoderLayer
from stagemesh.stages.layers.mlp import GatedMLP
from stagemesh.stages.layers.norm import RMSNorm
from stagemesh.stages.models.causal_lm import CausalLM


class LlamaForCausalLM(CausalLM):
    qk_norm = False

    def make_layer(self, index: int) -> DecoderLayer:
        config, name = self.config, f"model.layers.{index}"
        return DecoderLayer(
            RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps),
            Attention(
                f"{name}.self_attn",
                config,
                self.tp,
                bias=config.attention_bias,
                output_bias=config.attention_bias,
                qk_norm=self.qk_norm,
                make_method=self.make_method,
            ),
            RMSNorm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
            GatedMLP(
                f"{name}.mlp",
                config.hidden_size,
                config.intermediate_size,
                self.tp,
                bias=config.mlp_bias,
                make_method=self.make_method,
            ),
        )

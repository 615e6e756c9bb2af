"""Llama 2, 3.x."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from stagemesh.config.model import Family, ModelConfig, MoeNames

if TYPE_CHECKING:
    from stagemesh.stages.models.decoder import AttentionBlock, Decoder, DecoderLayer, FeedForward


class Llama(Family):
    expert_names: ClassVar[MoeNames | None] = None

    attention_bias: bool = False
    mlp_bias: bool = False

    def resolve(self) -> ModelConfig:
        bias = self.attention_bias
        return replace(super().resolve(), qkv_bias=bias, output_bias=bias, mlp_bias=self.mlp_bias)

    def decoder_layer(self, model: Decoder, index: int) -> DecoderLayer:
        from stagemesh.stages.layers.norm import RMSNorm
        from stagemesh.stages.models.decoder import PreNormLayer

        config, name = model.config, f"model.layers.{index}"
        return PreNormLayer(
            RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps),
            self.attention(model, f"{name}.self_attn"),
            RMSNorm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
            self.feed_forward(model, index, name),
        )

    def attention(self, model: Decoder, name: str) -> AttentionBlock:
        from stagemesh.stages.layers.attention import Attention

        return Attention(name, model.config, model.tp, make_method=model.make_method)

    def feed_forward(self, model: Decoder, index: int, name: str) -> FeedForward:
        from stagemesh.stages.layers.mlp import GatedMLP
        from stagemesh.stages.layers.moe import MoE

        config, tp, make_method = model.config, model.tp, model.make_method
        if config.moe and self.expert_names and index in config.moe.layers:
            return MoE(
                name,
                self.expert_names,
                config.moe,
                config.hidden_size,
                tp,
                expert_parallel=model.expert_parallel,
                make_method=make_method,
            )
        sizes = (config.hidden_size, config.intermediate_size)
        return GatedMLP(f"{name}.mlp", *sizes, tp, bias=config.mlp_bias, make_method=make_method)

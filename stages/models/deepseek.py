"""DeepSeek-V2 and V3: latent attention, and a mixture with shared experts behind the first, dense layers."""

from __future__ import annotations

from stagemesh.stages.layers.latent_attention import LatentAttention
from stagemesh.stages.layers.moe import MoENames
from stagemesh.stages.layers.norm import RMSNorm
from stagemesh.stages.models.decoder import DecoderLayer
from stagemesh.stages.models.mixture import MixtureForCausalLM


class DeepseekForCausalLM(MixtureForCausalLM):
    names = MoENames(
        router="mlp.gate",
        expert="mlp.experts.{}",
        projections=("gate_proj", "up_proj", "down_proj"),
        shared_expert="mlp.shared_experts",
        choice_bias="mlp.gate.e_score_correction_bias",
    )

    def make_layer(self, index: int) -> DecoderLayer:
        config, name = self.config, f"model.layers.{index}"
        assert config.mla is not None
        return DecoderLayer(
            RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps),
            LatentAttention(
                f"{name}.self_attn",
                config.mla,
                config.num_heads,
                config.hidden_size,
                self.tp,
                bias=config.output_bias,
                make_method=self.make_method,
            ),
            RMSNorm(f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
            self.make_feed_forward(index, name),
        )

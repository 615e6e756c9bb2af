"""DeepSeek-V2 and V3: latent attention, dense layers first, then mixtures with shared experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stagemesh.config.errors import ConfigError
from stagemesh.config.model import MlaConfig, ModelConfig, MoeConfig, MoeNames, even
from stagemesh.config.rope import RopeConfig, yarn_mscale
from stagemesh.stages.models.llama import Llama

if TYPE_CHECKING:
    from stagemesh.stages.models.decoder import AttentionBlock, Decoder


class DeepseekV2(Llama):
    is_v3: ClassVar[bool] = False
    expert_names: ClassVar[MoeNames] = MoeNames(
        router="mlp.gate",
        expert="mlp.experts.{}",
        shared_expert="mlp.shared_experts",
        choice_bias="mlp.gate.e_score_correction_bias",
    )

    n_routed_experts: int | None = Field(default=None, ge=1)
    num_local_experts: int | None = Field(default=None, ge=1)
    """n_routed_experts in transformers 5."""
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    norm_topk_prob: bool = False
    n_shared_experts: int | None = Field(default=None, ge=0)
    n_group: int | None = Field(default=None, ge=1)
    topk_group: int | None = Field(default=None, ge=1)
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = Field(default=0, ge=0)
    moe_layer_freq: Literal[1] = 1
    q_lora_rank: int | None = Field(default=None, ge=1)
    kv_lora_rank: int | None = Field(default=None, ge=1)
    qk_nope_head_dim: int | None = Field(default=None, ge=1)
    qk_rope_head_dim: int | None = Field(default=None, ge=1)
    v_head_dim: int | None = Field(default=None, ge=1)
    rope_interleave: bool = True

    def resolve(self) -> ModelConfig:
        config = super().resolve()
        return replace(config, num_kv_heads=1, mla=self._mla(config.rope), moe=self._moe())

    def cached_head_dim(self) -> int:
        return self.required("kv_lora_rank") + even("qk_rope_head_dim", self.required("qk_rope_head_dim"))

    def attention(self, model: Decoder, name: str) -> AttentionBlock:
        from stagemesh.stages.layers.latent_attention import LatentAttention

        return LatentAttention(name, model.config, model.tp, make_method=model.make_method)

    def _mla(self, rope: RopeConfig) -> MlaConfig:
        nope, turning = self.required("qk_nope_head_dim"), self.required("qk_rope_head_dim")
        mscale = self.rope_keys.get("mscale_all_dim") or 0.0
        sharper = yarn_mscale(rope.factor, mscale) if rope.kind != "default" else 1.0
        return MlaConfig(
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.required("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=turning,
            v_head_dim=self.required("v_head_dim"),
            scale=(nope + turning) ** -0.5 * sharper**2,
            rope_interleave=self.rope_interleave or not self.is_v3,
        )

    def _moe(self) -> MoeConfig:
        num_experts = self.n_routed_experts or self.required("num_local_experts")
        if self.norm_topk_prob and not self.is_v3:
            raise ConfigError("norm_topk_prob", True, f"not supported with {self.architecture}")
        if self.topk_method == "noaux_tc" and not self.is_v3:
            raise ConfigError("topk_method", self.topk_method, f"not supported with {self.architecture}")
        grouped = self.is_v3 or self.topk_method == "group_limited_greedy"
        num_groups = (self.n_group or 1) if grouped else 1
        top_groups = (self.topk_group or 1) if grouped else 1
        if num_experts % num_groups or top_groups > num_groups:
            raise ConfigError("n_group", num_groups, f"must divide the {num_experts} experts and be >= topk_group")
        if self.is_v3 and num_experts // num_groups < 2:
            raise ConfigError("n_group", num_groups, "leaves one expert in a group, which is rated by its best two")
        width = self.required("moe_intermediate_size")
        return MoeConfig(
            num_experts=num_experts,
            top_k=self.required("num_experts_per_tok"),
            intermediate_size=width,
            norm_topk_prob=self.norm_topk_prob,
            shared_intermediate_size=width * (self.n_shared_experts or 0),
            layers=frozenset(range(self.first_k_dense_replace, self.num_hidden_layers)),
            sigmoid=self.is_v3,
            num_groups=num_groups,
            top_groups=top_groups,
            weight_scale=self.routed_scaling_factor,
            float32_router=True,
        )


class DeepseekV3(DeepseekV2):
    is_v3 = True

"""What a model is, read from the config.json of its Hugging Face folder. Nothing is guessed: a feature that
is not supported is refused by name, for it would change the answers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field

from stagemesh.config.base import Settings
from stagemesh.config.errors import ConfigError
from stagemesh.config.quantization import Quantization, read_quantization

Architecture = Literal[
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
]
DEEPSEEK = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
DType = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding. The factors below are unused by kinds that do not scale with them."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    """Context extension of every kind but "default"."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    """Positions that the model saw before "llama3", "dynamic" or "yarn" extended them."""
    beta_fast: float = 32.0
    """Turns within the original positions above which "yarn" keeps a frequency; below beta_slow it divides it."""
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether "yarn" rounds the features where it starts and stops blending to whole ones."""
    attention_factor: float = 1.0
    """What "yarn" multiplies queries and keys with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """The mixture of experts that takes the place of the MLP in some layers."""

    num_experts: int
    top_k: int
    """Experts of each token."""
    intermediate_size: int
    """Of one expert."""
    norm_topk_prob: bool
    """Whether the weights of a token's experts are scaled to add up to 1."""
    shared_intermediate_size: int
    """Of the expert that every token goes through; 0 = there is none."""
    layers: frozenset[int]
    """Which layers; the others have a plain MLP of the model's intermediate_size."""
    shared_gate: bool = False
    """Whether a gate of its own weighs the shared expert (Qwen2-MoE)."""
    sigmoid: bool = False
    """Experts are scored one by one, with a bias that only matters to the choice (DeepSeek-V3); else by softmax."""
    num_groups: int = 1
    """The experts are in so many groups of which only the best top_groups are chosen from (DeepSeek)."""
    top_groups: int = 1
    weight_scale: float = 1.0
    """What all weights are multiplied with in the end."""
    float32_router: bool = False
    """Whether the router computes in float32 whatever the model's dtype is (DeepSeek)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are projections of a short
    vector, and that is what the cache holds.
    """

    q_lora_rank: int | None
    """Width of the latent that queries are projected from; None = straight from the hidden state."""
    kv_lora_rank: int
    """Width of the latent of keys and values."""
    qk_nope_head_dim: int
    """Features of a key without position; qk_rope_head_dim ones with it come behind, the same for all heads."""
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    """What scores are multiplied with before the softmax."""
    rope_interleave: bool
    """Whether rotary pairs are neighbours in the checkpoint, not half the dim apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer."""

    architecture: Architecture
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of queries and keys (Qwen3)."""
    sliding_window: int | None
    """Tokens that a query attends to, itself included (Mistral); None = all before it."""
    moe: MoeConfig | None
    """None = every layer has a plain MLP."""
    mla: MlaConfig | None
    """Latent attention. Its cache has one KV head, of head_dim = kv_lora_rank + qk_rope_head_dim features, which is
    key and value in one. None = grouped-query attention."""
    torch_dtype: DType
    """What the weights are stored in; float32 where config.json does not say."""
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer, from config.json and generation_config.json."""
    bos_token_id: int | None
    quantization: Quantization | None = None
    """How the checkpoint stores its linear layers; None = as floats."""

    @property
    def rotary_dim(self) -> int:
        """Features of a head that turn with the position."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def kv_factor(self) -> int:
        """Vectors per token and KV head in the cache: key and value, or one that is both."""
        return 1 if self.mla else 2

    @property
    def longest_context(self) -> int:
        """Most positions that RoPE can be stretched to; max_position_embeddings where it is not."""
        if self.rope.kind in ("dynamic", "yarn"):
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json and, where present, generation_config.json.

        Raises ConfigError that names the file and the key: missing, of the wrong type, or not supported.
        """
        folder = Path(path)
        raw = _read_json(folder / "config.json")
        generation = {}
        if (folder / "generation_config.json").exists():
            generation = _read_json(folder / "generation_config.json")
        try:
            asked = _ConfigJson.parse(raw)
            return asked.resolve(_eos_token_ids(generation) + _eos_token_ids(raw))
        except ConfigError as error:
            raise ConfigError(error.field, error.value, f"{error.reason} (in {folder / 'config.json'})") from None


class _RopeJson(Settings):
    """`rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta` merged into it (before)."""

    model_config = pydantic.ConfigDict(extra="ignore")

    rope_type: RopeKind = "default"
    rope_theta: float = Field(gt=0)
    factor: float | None = Field(default=None, ge=1)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)

    def resolve(self, max_position_embeddings: int) -> RopeConfig:
        if self.rope_type == "yarn":
            return self._yarn(max_position_embeddings)
        needed = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[self.rope_type]
        given = {name: getattr(self, name) for name in needed}
        for name, value in given.items():
            if value is None:
                raise ConfigError(name, None, f"is required by rope_type={self.rope_type!r}")
        if self.rope_type == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
            allowed = f"must be above low_freq_factor={given['low_freq_factor']}"
            raise ConfigError("high_freq_factor", given["high_freq_factor"], allowed)
        if self.rope_type == "dynamic":
            given["original_max_position_embeddings"] = max_position_embeddings
        return RopeConfig(theta=self.rope_theta, kind=self.rope_type, **given)

    def _yarn(self, max_position_embeddings: int) -> RopeConfig:
        original = self.original_max_position_embeddings or max_position_embeddings
        factor = self.factor or max(1.0, max_position_embeddings / original)
        attention_factor = self.attention_factor
        if attention_factor is None and self.mscale and self.mscale_all_dim:
            attention_factor = yarn_mscale(factor, self.mscale) / yarn_mscale(factor, self.mscale_all_dim)
        return RopeConfig(
            theta=self.rope_theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=self.beta_fast or 32.0,
            beta_slow=self.beta_slow or 1.0,
            truncate=self.truncate,
            attention_factor=yarn_mscale(factor, 1.0) if attention_factor is None else attention_factor,
        )


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much sharper attention has to be when the context grows by `factor` (arXiv:2309.00071, 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class _ConfigJson(Settings):
    """The keys of config.json that matter here, under their own names. Others only concern training."""

    model_config = pydantic.ConfigDict(extra="ignore")

    architectures: list[str] = Field(min_length=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    vocab_size: int = Field(ge=1)
    rms_norm_eps: float = Field(gt=0)
    max_position_embeddings: int = Field(ge=1)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    torch_dtype: DType | None = None
    dtype: DType | None = None
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    sliding_window: int | None = Field(default=None, ge=0)
    use_sliding_window: Literal[False] | None = False
    qkv_bias: bool = True
    num_experts: int | None = Field(default=None, ge=1)
    num_local_experts: int | None = Field(default=None, ge=1)
    num_experts_per_tok: int | None = Field(default=None, ge=1)
    moe_intermediate_size: int | None = Field(default=None, ge=1)
    shared_expert_intermediate_size: int | None = Field(default=None, ge=1)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(default=1, ge=1)
    mlp_only_layers: list[int] | None = None
    n_routed_experts: int | None = Field(default=None, ge=1)
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
    quantization_config: dict[str, Any] | None = None

    def resolve(self, eos_token_ids: list[int]) -> ModelConfig:
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        architecture = self._architecture()
        if heads % kv_heads:
            allowed = f"must divide num_attention_heads={heads}"
            raise ConfigError("num_key_value_heads", kv_heads, allowed)
        rope = self._rope(architecture)
        mla = self._mla(architecture, rope)
        if mla is not None:
            kv_heads, head_dim = 1, mla.kv_lora_rank + mla.qk_rope_head_dim
        else:
            head_dim = self._head_dim()
        is_qwen2 = architecture in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")
        return ModelConfig(
            architecture=architecture,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            rope=rope,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
            qkv_bias=self.qkv_bias if is_qwen2 else self.attention_bias,
            output_bias=self.attention_bias and not is_qwen2,
            mlp_bias=self.mlp_bias,
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            sliding_window=self._sliding_window(architecture),
            moe=self._moe(architecture),
            mla=mla,
            torch_dtype=self.dtype or self.torch_dtype or "float32",
            eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
            bos_token_id=self.bos_token_id,
            quantization=read_quantization(self.quantization_config),
        )

    def _architecture(self) -> Architecture:
        supported: tuple[Architecture, ...] = get_args(Architecture)
        for architecture in supported:
            if architecture in self.architectures:
                return architecture
        reason = f"not supported; supported are {', '.join(supported)}"
        raise ConfigError("architectures", self.architectures, reason)

    def _head_dim(self) -> int:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            allowed = f"must be a multiple of num_attention_heads={heads} where head_dim is not given"
            raise ConfigError("hidden_size", self.hidden_size, allowed)
        return _even("head_dim", self.head_dim or self.hidden_size // heads)

    def _sliding_window(self, architecture: Architecture) -> int | None:
        if architecture == "MistralForCausalLM" and "sliding_window" not in self.model_fields_set:
            return 4096  # what transformers takes it for
        # The Qwen families carry a window that use_sliding_window switches off.
        return self.sliding_window or None if architecture in ("MistralForCausalLM", "MixtralForCausalLM") else None

    def _moe(self, architecture: Architecture) -> MoeConfig | None:
        if architecture == "MixtralForCausalLM":
            return MoeConfig(
                num_experts=self._required("num_local_experts"),
                top_k=self._top_k(self._required("num_local_experts")),
                intermediate_size=self.intermediate_size,
                norm_topk_prob=True,
                shared_intermediate_size=0,
                layers=frozenset(range(self.num_hidden_layers)),
            )
        if architecture in DEEPSEEK:
            return self._deepseek_moe(architecture)
        if architecture not in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
            return None
        num_experts = self.num_experts or self._required("num_local_experts")  # transformers 5 renamed it
        dense = self.mlp_only_layers or []
        step = self.decoder_sparse_step
        return MoeConfig(
            num_experts=num_experts,
            top_k=self._top_k(num_experts),
            intermediate_size=self._required("moe_intermediate_size"),
            norm_topk_prob=self.norm_topk_prob,
            shared_intermediate_size=(
                self._required("shared_expert_intermediate_size") if architecture == "Qwen2MoeForCausalLM" else 0
            ),
            layers=frozenset(i for i in range(self.num_hidden_layers) if i not in dense and (i + 1) % step == 0),
            shared_gate=architecture == "Qwen2MoeForCausalLM",
        )

    def _deepseek_moe(self, architecture: Architecture) -> MoeConfig:
        num_experts = self.n_routed_experts or self._required("num_local_experts")
        is_v3 = architecture == "DeepseekV3ForCausalLM"
        if self.norm_topk_prob and not is_v3:
            raise ConfigError("norm_topk_prob", True, f"not supported with {architecture}")
        if self.topk_method == "noaux_tc" and not is_v3:
            raise ConfigError("topk_method", self.topk_method, f"not supported with {architecture}")
        grouped = is_v3 or self.topk_method == "group_limited_greedy"
        num_groups = (self.n_group or 1) if grouped else 1
        top_groups = (self.topk_group or 1) if grouped else 1
        if num_experts % num_groups or top_groups > num_groups:
            raise ConfigError("n_group", num_groups, f"must divide the {num_experts} experts and be >= topk_group")
        if is_v3 and num_experts // num_groups < 2:
            raise ConfigError("n_group", num_groups, "leaves one expert in a group, which is rated by its best two")
        width = self._required("moe_intermediate_size")
        return MoeConfig(
            num_experts=num_experts,
            top_k=self._top_k(num_experts // num_groups * top_groups),
            intermediate_size=width,
            norm_topk_prob=self.norm_topk_prob,
            shared_intermediate_size=width * (self.n_shared_experts or 0),
            layers=frozenset(range(self.first_k_dense_replace, self.num_hidden_layers)),
            sigmoid=is_v3,
            num_groups=num_groups,
            top_groups=top_groups,
            weight_scale=self.routed_scaling_factor,
            float32_router=True,
        )

    def _mla(self, architecture: Architecture, rope: RopeConfig) -> MlaConfig | None:
        if architecture not in DEEPSEEK:
            return None
        nope = self._required("qk_nope_head_dim")
        turning = _even("qk_rope_head_dim", self._required("qk_rope_head_dim"))
        given = self.rope_parameters or self.rope_scaling or {}
        sharper = yarn_mscale(rope.factor, given.get("mscale_all_dim") or 0.0) if rope.kind != "default" else 1.0
        return MlaConfig(
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self._required("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=turning,
            v_head_dim=self._required("v_head_dim"),
            scale=(nope + turning) ** -0.5 * sharper**2,
            rope_interleave=self.rope_interleave or architecture == "DeepseekV2ForCausalLM",
        )

    def _top_k(self, num_experts: int) -> int:
        top_k = self._required("num_experts_per_tok")
        if top_k > num_experts:
            raise ConfigError("num_experts_per_tok", top_k, f"must be at most the {num_experts} experts")
        return top_k

    def _required(self, name: str) -> int:
        value: int | None = getattr(self, name)
        if value is None:
            raise ConfigError(name, None, f"is required by {self._architecture()}")
        return value

    def _rope(self, architecture: Architecture) -> RopeConfig:
        raw = dict(self.rope_parameters or self.rope_scaling or {})
        if "type" in raw:  # the name of rope_type in old configs
            raw.setdefault("rope_type", raw["type"])
        default = 1e6 if architecture == "MixtralForCausalLM" else 10000.0
        raw.setdefault("rope_theta", self.rope_theta if self.rope_theta is not None else default)
        return _RopeJson.parse(raw).resolve(self.max_position_embeddings)


def _even(name: str, dim: int) -> int:
    if dim % 2:
        raise ConfigError(name, dim, "must be even: rotary embedding turns pairs")
    return dim


def _eos_token_ids(raw: dict[str, Any]) -> list[int]:
    given = raw.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError("eos_token_id", given, "must be a token id, a list of token ids, or null")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = f"is not a model folder: {path.name} is missing"
        raise ConfigError("model", str(path.parent), reason) from None
    except (OSError, ValueError) as error:
        raise ConfigError("model", str(path.parent), f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("model", str(path.parent), f"{path.name} must hold a JSON object")
    return content

"""What a model is (`ModelConfig`), as its family (`Family`) reads it from config.json.

Unsupported features are refused by name, for they change the answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field

from stagemesh.config.base import Settings, did_you_mean
from stagemesh.config.errors import ConfigError
from stagemesh.config.families import FAMILIES
from stagemesh.config.quantization import Quantization, read_quantization
from stagemesh.config.rope import RopeConfig, read_rope

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A mixture of experts for the MLP of some layers."""

    num_experts: int
    top_k: int
    """Experts per token."""
    intermediate_size: int
    """Of one expert."""
    norm_topk_prob: bool
    """A token's weights add up to 1."""
    shared_intermediate_size: int
    """Of the shared expert; 0 = none."""
    layers: frozenset[int]
    """The others have a plain MLP of the model's intermediate_size."""
    shared_gate: bool = False
    """A gate weighs the shared expert (Qwen2-MoE)."""
    sigmoid: bool = False
    """Score by sigmoid, with a bias for the choice (DeepSeek-V3); else softmax."""
    num_groups: int = 1
    """Experts come from the best top_groups of them (DeepSeek)."""
    top_groups: int = 1
    weight_scale: float = 1.0
    """Factor of all weights."""
    float32_router: bool = False
    """The router computes in float32 in any dtype (DeepSeek)."""

    def __post_init__(self) -> None:
        candidates = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > candidates:
            raise ConfigError("num_experts_per_tok", self.top_k, f"must be at most the {candidates} experts")


@dataclass(frozen=True)
class MoeNames:
    """A family's names of a mixture's tensors, below the layer's."""

    router: str
    expert: str
    """With {} for the expert's number."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """gate, up, down."""
    shared_expert: str = ""
    shared_gate: str = ""
    choice_bias: str = ""
    """Added to the scores for the choice alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (arXiv:2405.04434): keys and values are projections of one short cached vector."""

    q_lora_rank: int | None
    """None = queries have no latent."""
    kv_lora_rank: int
    """Width of the cached latent."""
    qk_nope_head_dim: int
    """Features of a key without position; qk_rope_head_dim with it follow, shared by all heads."""
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    """Factor of the scores before the softmax."""
    rope_interleave: bool
    """The checkpoint's rotary pairs are neighbours, not half the dim apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer."""

    family: Family
    """Makes the decoder layers; pickled by its module's name."""
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
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of each query and key head."""
    sliding_window: int | None = None
    """Tokens that a query attends to, its own included; None = all."""
    moe: MoeConfig | None = None
    """None = plain MLPs."""
    mla: MlaConfig | None = None
    """One KV head of kv_lora_rank + qk_rope_head_dim features, key and value in one; None = grouped-query attention."""
    torch_dtype: DType
    """Of the stored weights; float32 where config.json does not say."""
    eos_token_ids: tuple[int, ...] = ()
    """From generation_config.json and config.json."""
    bos_token_id: int | None
    quantization: Quantization | None = None
    """Of the stored linear layers; None = floats."""

    @property
    def architecture(self) -> str:
        return self.family.architecture

    @property
    def rotary_dim(self) -> int:
        """Features of a head that RoPE turns."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def kv_factor(self) -> int:
        """Cached vectors per token and head: key and value, or one that is both."""
        return 1 if self.mla else 2

    @property
    def longest_context(self) -> int:
        """Most positions that RoPE stretches to."""
        if self.rope.kind in ("dynamic", "yarn"):
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    @classmethod
    def from_folder(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read config.json and, where present, generation_config.json. ConfigError names the file and the key.

        overrides: keys of config.json with other values.
        """
        folder = Path(path)
        raw = read_json(folder / "config.json") | dict(overrides or {})
        generation_file = folder / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else {}
        try:
            eos_token_ids = dict.fromkeys(_eos_token_ids(generation) + _eos_token_ids(raw))
            family = _read_family(raw)
            known = {*type(family).model_fields, "architectures", "eos_token_id"}
            for name in set(overrides or ()) - known:
                raise ConfigError("hf_overrides", name, "is no key that this model reads" + did_you_mean(name, known))
            return replace(family.resolve(), eos_token_ids=tuple(eos_token_ids))
        except ConfigError as error:
            raise ConfigError(error.field, error.value, f"{error.reason} (in {folder / 'config.json'})") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ModelConfig:
        """From the content of config.json, without what generation ends with."""
        return _read_family(raw).resolve()


class Family(Settings):
    """A model family: the keys that it reads from config.json, and its decoder layer.

    A subclass in stages/models/, with a line in config/families.py, declares more keys, and its `resolve` replaces what
    differs from a plain model. Processes without tensors import it too: torch and layers only inside functions.
    """

    model_config = pydantic.ConfigDict(extra="ignore")
    default_rope_theta: ClassVar[float] = 10000.0
    """Where config.json names none."""

    architecture: str
    """The entry of `architectures` that names the family."""
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
    bos_token_id: int | None = None
    torch_dtype: DType | None = None
    dtype: DType | None = None
    rope_theta: float | None = Field(default=None, gt=0)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: Literal[False] | None = False
    quantization_config: dict[str, Any] | None = None

    def decoder_layer(self, model: Any, index: int) -> Any:
        """The DecoderLayer `index` of the Decoder `model`; Any, because config/ imports nothing of stages/."""
        raise NotImplementedError

    def resolve(self) -> ModelConfig:
        """Check the keys against one another. ConfigError names the wrong one."""
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        if heads % kv_heads:
            raise ConfigError("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
        rope_theta = self.default_rope_theta if self.rope_theta is None else self.rope_theta
        return ModelConfig(
            family=self,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.cached_head_dim(),
            vocab_size=self.vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            rope=read_rope(self.rope_keys, rope_theta, self.max_position_embeddings),
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
            torch_dtype=self.dtype or self.torch_dtype or "float32",
            bos_token_id=self.bos_token_id,
            quantization=read_quantization(self.quantization_config),
        )

    @property
    def rope_keys(self) -> dict[str, Any]:
        return self.rope_parameters or self.rope_scaling or {}

    def cached_head_dim(self) -> int:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            allowed = f"must be a multiple of num_attention_heads={heads} where head_dim is not given"
            raise ConfigError("hidden_size", self.hidden_size, allowed)
        return even("head_dim", self.head_dim or self.hidden_size // heads)

    def required(self, name: str) -> int:
        """The value of an optional key; ConfigError if it is missing."""
        value: int | None = getattr(self, name)
        if value is None:
            raise ConfigError(name, None, f"is required by {self.architecture}")
        return value


class _Architectures(Settings):
    model_config = pydantic.ConfigDict(extra="ignore")

    architectures: list[str] = Field(min_length=1)


def _read_family(raw: dict[str, Any]) -> Family:
    architectures = _Architectures.parse(raw).architectures
    architecture = next((name for name in FAMILIES if name in architectures), None)
    if architecture is None:
        raise ConfigError("architectures", architectures, f"not supported; supported are {', '.join(FAMILIES)}")
    module, name = FAMILIES[architecture].split(":")
    family: type[Family] = getattr(import_module(module), name)
    return family.parse({**raw, "architecture": architecture})


def even(name: str, dim: int) -> int:
    if dim % 2:
        raise ConfigError(name, dim, "must be even: rotary embedding turns pairs")
    return dim


def _eos_token_ids(raw: dict[str, Any]) -> list[int]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError("eos_token_id", value, "must be a token id, a list of token ids, or null")
    return ids


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("model", str(path.parent), f"is not a model folder: {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ConfigError("model", str(path.parent), f"{path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError("model", str(path.parent), f"{path.name} must hold a JSON object")
    return content

"""What a model is (`ModelConfig`), read from the config.json of its Hugging Face folder by its family (`Family`).

Nothing is guessed: a feature that is not supported is refused by name, for it would change the answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import Field

from stagemesh.config.base import Settings
from stagemesh.config.errors import ConfigError
from stagemesh.config.families import FAMILIES
from stagemesh.config.quantization import Quantization, read_quantization
from stagemesh.config.rope import RopeConfig, read_rope

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A mixture of experts in place of the MLP in some layers."""

    num_experts: int
    top_k: int
    """Experts of each token."""
    intermediate_size: int
    """Of one expert."""
    norm_topk_prob: bool
    """Whether a token's weights are scaled to add up to 1."""
    shared_intermediate_size: int
    """Of the expert that all tokens share; 0 = none."""
    layers: frozenset[int]
    """Which layers; the others have a plain MLP of the model's intermediate_size."""
    shared_gate: bool = False
    """Whether a gate of its own weighs the shared expert (Qwen2-MoE)."""
    sigmoid: bool = False
    """Score by sigmoid, with a bias that only affects the choice (DeepSeek-V3); else by softmax."""
    num_groups: int = 1
    """Groups of experts, of which the best top_groups are chosen from (DeepSeek)."""
    top_groups: int = 1
    weight_scale: float = 1.0
    """What all weights are multiplied with in the end."""
    float32_router: bool = False
    """Whether the router computes in float32 whatever the model's dtype is (DeepSeek)."""

    def __post_init__(self) -> None:
        candidates = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > candidates:
            raise ConfigError("num_experts_per_tok", self.top_k, f"must be at most the {candidates} experts")


@dataclass(frozen=True)
class MoeNames:
    """A family's names for the tensors of a mixture, below the layer's name."""

    router: str
    expert: str
    """With a {} for the number of the expert."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """gate, up, down of an expert."""
    shared_expert: str = ""
    shared_gate: str = ""
    choice_bias: str = ""
    """Added to the scores, for the choice of experts alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the cache holds a short vector that keys and
    values are projections of.
    """

    q_lora_rank: int | None
    """Width of the queries' latent; None = projected from the hidden state."""
    kv_lora_rank: int
    """Width of the latent of keys and values."""
    qk_nope_head_dim: int
    """Features of a key without position; qk_rope_head_dim with it follow, shared by all heads."""
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    """What scores are multiplied with before the softmax."""
    rope_interleave: bool
    """Whether the checkpoint's rotary pairs are neighbours, not half the dim apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer."""

    family: Family
    """Reads the keys that only it knows and makes the decoder layers; pickled by the name of its module."""
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
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys."""
    sliding_window: int | None = None
    """Tokens that a query attends to, itself included; None = all before it."""
    moe: MoeConfig | None = None
    """None = every layer has a plain MLP."""
    mla: MlaConfig | None = None
    """Latent attention: one KV head of kv_lora_rank + qk_rope_head_dim features, key and value in one. None =
    grouped-query attention.
    """
    torch_dtype: DType
    """What the weights are stored in; float32 where config.json does not say."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end an answer, from generation_config.json and config.json."""
    bos_token_id: int | None
    quantization: Quantization | None = None
    """How the checkpoint stores its linear layers; None = as floats."""

    @property
    def architecture(self) -> str:
        return self.family.architecture

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
        """Most positions that RoPE stretches to."""
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
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        try:
            eos_token_ids = dict.fromkeys(_eos_token_ids(generation) + _eos_token_ids(raw))
            return replace(_read_family(raw).resolve(), eos_token_ids=tuple(eos_token_ids))
        except ConfigError as error:
            raise ConfigError(error.field, error.value, f"{error.reason} (in {folder / 'config.json'})") from None


class Family(Settings):
    """A model family: the keys that it reads from config.json, what they come to, and its decoder layer.

    A subclass in a file of stages/models/ and a line in config/families.py. It declares the keys that it reads beside
    these, and `resolve` replaces what differs from a plain model; other keys are ignored. Processes without tensors
    import the file, so it imports torch and layers only inside of functions.
    """

    model_config = pydantic.ConfigDict(extra="ignore")
    default_rope_theta: ClassVar[float] = 10000.0
    """Where config.json names none."""

    architecture: str
    """The entry of `architectures` that the family is registered for."""
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
        """Layer `index` of `model`, a stages.models.decoder.Decoder; returns a DecoderLayer of the same file.

        The types are Any because config/ imports nothing of stages/.
        """
        raise NotImplementedError

    def resolve(self) -> ModelConfig:
        """The keys checked against one another. ConfigError names the one that cannot be."""
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        if heads % kv_heads:
            allowed = f"must divide num_attention_heads={heads}"
            raise ConfigError("num_key_value_heads", kv_heads, allowed)
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
        """Features of one head in the KV cache."""
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            allowed = f"must be a multiple of num_attention_heads={heads} where head_dim is not given"
            raise ConfigError("hidden_size", self.hidden_size, allowed)
        return even("head_dim", self.head_dim or self.hidden_size // heads)

    def required(self, name: str) -> int:
        """The value of a key that some configs of the family do not have; ConfigError if this one has not."""
        value: int | None = getattr(self, name)
        if value is None:
            raise ConfigError(name, None, f"is required by {self.architecture}")
        return value


class _Architectures(Settings):
    model_config = pydantic.ConfigDict(extra="ignore")

    architectures: list[str] = Field(min_length=1)


def _read_family(raw: dict[str, Any]) -> Family:
    """The family that the `architectures` of a config.json name, with the keys of that config.json."""
    architectures = _Architectures.parse(raw).architectures
    architecture = next((name for name in FAMILIES if name in architectures), None)
    if architecture is None:
        reason = f"not supported; supported are {', '.join(FAMILIES)}"
        raise ConfigError("architectures", architectures, reason)
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

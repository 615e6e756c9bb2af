"""What a model is, read from the config.json of its Hugging Face folder. Nothing is guessed: a feature that
is not supported is refused by name, for it would change the answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field

from stagemesh.config.base import Settings
from stagemesh.config.errors import ConfigError
from stagemesh.config.quantization import Quantization, read_quantization

Architecture = Literal["LlamaForCausalLM", "Qwen3ForCausalLM"]
DType = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding. The factors below are unused by kinds that do not scale with them."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    """Context extension of "linear" and "llama3"."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    """Positions that the model saw before "llama3" extended them."""


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
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of queries and keys (Qwen3)."""
    torch_dtype: DType
    """What the weights are stored in; float32 where config.json does not say."""
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer, from config.json and generation_config.json."""
    bos_token_id: int | None
    quantization: Quantization | None = None
    """How the checkpoint stores its linear layers; None = as floats."""

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
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)

    def resolve(self) -> RopeConfig:
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[self.rope_type]
        given = {name: getattr(self, name) for name in needed}
        for name, value in given.items():
            if value is None:
                raise ConfigError(name, None, f"is required by rope_type={self.rope_type!r}")
        if self.rope_type == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
            allowed = f"must be above low_freq_factor={given['low_freq_factor']}"
            raise ConfigError("high_freq_factor", given["high_freq_factor"], allowed)
        return RopeConfig(theta=self.rope_theta, kind=self.rope_type, **given)


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
    use_sliding_window: Literal[False] | None = False
    quantization_config: dict[str, Any] | None = None

    def resolve(self, eos_token_ids: list[int]) -> ModelConfig:
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        architecture = self._architecture()
        if heads % kv_heads:
            allowed = f"must divide num_attention_heads={heads}"
            raise ConfigError("num_key_value_heads", kv_heads, allowed)
        if self.head_dim is None and self.hidden_size % heads:
            allowed = f"must be a multiple of num_attention_heads={heads} where head_dim is not given"
            raise ConfigError("hidden_size", self.hidden_size, allowed)
        head_dim = self.head_dim or self.hidden_size // heads
        if head_dim % 2:
            raise ConfigError("head_dim", head_dim, "must be even: rotary embedding turns pairs")
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
            rope=self._rope(),
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=architecture == "Qwen3ForCausalLM",
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

    def _rope(self) -> RopeConfig:
        raw = dict(self.rope_parameters or self.rope_scaling or {})
        if "type" in raw:  # the name of rope_type in old configs
            raw.setdefault("rope_type", raw["type"])
        raw.setdefault("rope_theta", self.rope_theta if self.rope_theta is not None else 10000.0)
        return _RopeJson.parse(raw).resolve()


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

"""Formats of a checkpoint's linear layers, from the `quantization_config` of config.json; others are refused.

- `fp8`: Hugging Face's fine-grained FP8 (DeepSeek-V3), and AutoFP8's per-tensor one.
- `compressed-tensors`: FP8 and INT8 weights with activations of the same type.
- `awq`: AutoAWQ's GEMM layout. `gptq`: AutoGPTQ's, also with act-order and version 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from pydantic import Field

from stagemesh.config.base import Settings
from stagemesh.config.errors import ConfigError

QuantizationName = Literal["auto", "fp8", "int8", "awq", "gptq", "compressed-tensors"]


@dataclass(frozen=True, kw_only=True, slots=True)
class W8A8:
    """Weights and activations of 8 bits: value = stored · scale."""

    kind: Literal["fp8", "int8"]
    """fp8 is e4m3fn."""
    weights: Literal["tensor", "channel", "block"] = "channel"
    """What shares a weight scale."""
    block: tuple[int, int] = (128, 128)
    """Output and input features; activations then have a scale per token and block of inputs."""
    static_activations: bool = False
    """One activation scale per layer, from the checkpoint; else one per token, computed."""
    online: bool = False
    """Weights are quantized while they are loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class W4A16:
    """Weights of 4 bits, packed eight to an int32: value = (stored - zero) · scale of its group."""

    layout: Literal["awq", "gptq"]
    group_size: int
    """Input features that share scale and zero; -1 = all."""
    zero_offset: int = 0
    """What the stored zeros lack: 1 in GPTQ's first version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How a checkpoint's linear layers are stored."""

    method: str
    """The checkpoint's `quant_method`; "fp8" or "int8" when online."""
    format: W8A8 | W4A16
    dense: tuple[str, ...] = ()
    """Regular expressions (`re.match`) of layers that stay dense."""

    def covers(self, layer: str) -> bool:
        """Whether `layer` (`model.layers.0.mlp.down_proj`) is quantized."""
        return not any(re.match(pattern, layer) for pattern in self.dense)

    @property
    def description(self) -> str:
        """For messages, e.g. "gptq 4-bit"."""
        kind = "4-bit" if isinstance(self.format, W4A16) else self.format.kind
        return kind if kind == self.method else f"{self.method} {kind}"


def resolve_quantization(requested: QuantizationName, stored: Quantization | None) -> Quantization | None:
    """The format to run in: `stored`, or an online 8-bit one. ConfigError when `requested` contradicts `stored`."""
    if requested == "auto":
        return stored
    if stored is None:
        if requested == "fp8" or requested == "int8":
            return Quantization(method=requested, format=W8A8(kind=requested, online=True))
        remedy = f"`stagemesh quantize MODEL --to {requested} --out DIR` makes one that is"
        if requested == "compressed-tensors":
            remedy = "fp8 and int8 quantize while loading"
        raise ConfigError("quantization", requested, f"the checkpoint is not quantized; {remedy}")
    if requested not in (stored.method, getattr(stored.format, "kind", None)):
        raise ConfigError("quantization", requested, f"the checkpoint is {stored.description}; auto takes it as it is")
    return stored


def read_quantization(raw: Mapping[str, Any] | None) -> Quantization | None:
    """From `quantization_config`; ConfigError names what is not supported."""
    if raw is None:
        return None
    method = raw.get("quant_method")
    parser = _PARSERS.get(method) if isinstance(method, str) else None
    if parser is None:
        raise ConfigError("quant_method", method, f"not supported; supported are {', '.join(_PARSERS)}")
    return parser.parse(raw).resolve()


class _Json(Settings):
    """Keys about how it was quantized (damping, dataset, …) are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore")

    def resolve(self) -> Quantization:
        raise NotImplementedError


class _Fp8Json(_Json):
    quant_method: Literal["fp8"]
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"
    scale_fmt: Literal["float"] | None = None
    weight_block_size: list[int] | None = Field(default=None, min_length=2, max_length=2)
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None

    def resolve(self) -> Quantization:
        dense = _parts_of_names(self.modules_to_not_convert) + tuple(map(_exact, self.ignored_layers or []))
        static = self.activation_scheme == "static"
        if self.weight_block_size is None:
            format = W8A8(kind="fp8", weights="tensor", static_activations=static)
        elif static:
            reason = "goes with one weight scale per matrix, not with weight_block_size"
            raise ConfigError("activation_scheme", "static", reason)
        elif min(self.weight_block_size) < 1:
            raise ConfigError("weight_block_size", self.weight_block_size, "must be two sizes of at least 1")
        else:
            rows, columns = self.weight_block_size
            format = W8A8(kind="fp8", weights="block", block=(rows, columns))
        return Quantization(method="fp8", format=format, dense=dense)


class _Values(_Json):
    """Weights or activations in compressed-tensors."""

    num_bits: Literal[8]
    type: Literal["float", "int"] = "int"
    strategy: Literal["tensor", "channel", "block", "token", "group"]
    symmetric: Literal[True] = True
    dynamic: bool = False
    block_structure: list[int] | None = Field(default=None, min_length=2, max_length=2)
    group_size: int | None = None


class _ConfigGroup(_Json):
    targets: list[str]
    weights: dict[str, Any]
    input_activations: dict[str, Any]
    output_activations: None = None


class _CompressedTensorsJson(_Json):
    quant_method: Literal["compressed-tensors"]
    format: Literal["float-quantized", "int-quantized", "naive-quantized"]
    config_groups: dict[str, dict[str, Any]]
    ignore: list[str] | None = None
    quantization_status: Literal["compressed", "frozen"] = "compressed"
    kv_cache_scheme: None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None

    def resolve(self) -> Quantization:
        for name, section in (("sparsity_config", self.sparsity_config), ("transform_config", self.transform_config)):
            if section and section.get("format", "") != "dense":
                raise ConfigError(name, section, "not supported")
        if len(self.config_groups) != 1:
            raise ConfigError("config_groups", sorted(self.config_groups), "one group for all layers is supported")
        group = _ConfigGroup.parse(next(iter(self.config_groups.values())))
        if group.targets != ["Linear"]:
            raise ConfigError("targets", group.targets, 'supported is ["Linear"], with `ignore` for exceptions')
        weights, inputs = _Values.parse(group.weights), _Values.parse(group.input_activations)
        format = _w8a8(weights, inputs)
        dense = [name.removeprefix("re:") if name.startswith("re:") else _exact(name) for name in self.ignore or []]
        return Quantization(method="compressed-tensors", format=format, dense=tuple(dense))


def _w8a8(weights: _Values, inputs: _Values) -> W8A8:
    if weights.type != inputs.type:
        raise ConfigError("type", inputs.type, f"weights are {weights.type}; both must be alike")
    if weights.dynamic:
        raise ConfigError("dynamic", True, "weights are quantized once")
    kind: Literal["fp8", "int8"] = "fp8" if weights.type == "float" else "int8"
    if weights.strategy == "block":
        block = weights.block_structure or [128, 128]
        if not inputs.dynamic or inputs.strategy != "group" or inputs.group_size != block[1]:
            reason = f"weights in blocks go with dynamic activations in groups of {block[1]}"
            raise ConfigError("input_activations", inputs.strategy, reason)
        return W8A8(kind=kind, weights="block", block=(block[0], block[1]))
    if weights.strategy != "tensor" and weights.strategy != "channel":
        raise ConfigError("strategy", weights.strategy, "weights are scaled per tensor, channel or block")
    if inputs.strategy != ("token" if inputs.dynamic else "tensor"):
        reason = "activations are scaled dynamically per token, or statically per tensor"
        raise ConfigError("strategy", inputs.strategy, reason)
    return W8A8(kind=kind, weights=weights.strategy, static_activations=not inputs.dynamic)


class _AwqJson(_Json):
    quant_method: Literal["awq"]
    bits: Literal[4]
    group_size: int
    version: str = "gemm"
    zero_point: Literal[True] = True
    modules_to_not_convert: list[str] | None = None

    def resolve(self) -> Quantization:
        if self.version.lower() != "gemm":
            raise ConfigError("version", self.version, "supported is gemm")
        format = W4A16(layout="awq", group_size=_group_size(self.group_size))
        return Quantization(method="awq", format=format, dense=_parts_of_names(self.modules_to_not_convert))


class _GptqJson(_Json):
    quant_method: Literal["gptq"]
    bits: Literal[4]
    group_size: int
    desc_act: bool = False
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    lm_head: Literal[False] = False
    dynamic: dict[str, Any] | None = None
    modules_in_block_to_quantize: None = None

    def resolve(self) -> Quantization:
        if self.dynamic:
            raise ConfigError("dynamic", self.dynamic, "rules for single layers are not supported")
        offset = 1 if self.checkpoint_format == "gptq" else 0
        format = W4A16(layout="gptq", group_size=_group_size(self.group_size), zero_offset=offset)
        return Quantization(method="gptq", format=format)


_PARSERS: dict[str, type[_Json]] = {
    "fp8": _Fp8Json,
    "compressed-tensors": _CompressedTensorsJson,
    "awq": _AwqJson,
    "gptq": _GptqJson,
}


def _group_size(size: int) -> int:
    if size != -1 and size < 1:
        raise ConfigError("group_size", size, "must be at least 1, or -1 for one group")
    return size


def _exact(name: str) -> str:
    return re.escape(name) + "$"


def _parts_of_names(names: list[str] | None) -> tuple[str, ...]:
    """`mlp.gate` matches every layer called so or below; `layers.1` does not match `layers.10`."""
    return tuple(rf"(.*\.)?{re.escape(name)}(\.|$)" for name in names or [])

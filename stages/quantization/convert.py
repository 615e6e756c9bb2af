"""Makes a quantized checkpoint of a plain one, in the published layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stagemesh.config.checkpoint import INDEX_FILE, SINGLE_FILE, checkpoint_files
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model
from stagemesh.config.model import ModelConfig
from stagemesh.kernels.quant_int4 import AWQ_ORDER, PER_WORD, pack_columns, pack_rows
from stagemesh.kernels.quant_w8a8 import FP8, MIN_SCALE, largest, quantize, quantize_groups
from stagemesh.stages.quantization.calibration import RecordingMethod, layers_with_inputs
from stagemesh.stages.quantization.rounding import Rounded, round_awq, round_gptq, search_input_scales

SHARD_BYTES = 5 * 10**9
COPIED = (".json", ".txt", ".model", ".jinja")
"""Tokenizer, chat template, generation settings."""
FP8_BLOCK = 128
MIN_GROUP_SIZE = 8

ROWS_ABSORB = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
"""AWQ divides the first's inputs by dividing the second's outputs."""
NORM_ABSORBS = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
}
"""Likewise where only these layers read the norm; a mixture's router reads it too."""
ROUTERS = "gate.weight"
DENSE = ("lm_head", "gate", "shared_expert_gate")
"""Last part of the names of layers that stay dense."""
NEVER_CLIPPED = ("q_proj", "k_proj")
"""Clipping harms attention scores more than output errors show."""

Read = Callable[[str], Tensor | None]
"""A tensor of the source by name, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    to: Literal["awq", "gptq", "fp8", "int8"]
    group_size: int = 128
    """4 bits: inputs that share a scale, at most (fitting_group_size)."""
    act_order: bool = False
    """gptq: round the most important inputs first."""
    scheme: Literal["channel", "tensor", "block"] = "channel"
    """8 bits: what shares a weight scale; 128x128 blocks for fp8 only."""
    static_activations: bool = False
    """8 bits: an activation scale per layer, from calibration text."""

    @property
    def needs_text(self) -> bool:
        return self.to in ("awq", "gptq") or self.static_activations


def quantize_checkpoint(
    model: str,
    out: Path,
    recipe: Recipe,
    samples: Sequence[Sequence[int]],
    report: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model`, quantized by `recipe`, to the folder `out`; ConfigError before anything is written.

    samples: token ids of calibration text. report: gets the layers done and their total after each. Embedding, head
    and biases stay; norms may absorb AWQ's scales.
    """
    folder = find_model(model)
    config = ModelConfig.from_folder(folder)
    _check(folder, config, recipe, out, bool(samples))
    source = _Source(folder)
    shapes = source.linear_shapes()
    group_size = fitting_group_size(recipe.group_size, shapes) if recipe.to in ("awq", "gptq") else 0
    out.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(out, shard_bytes)
    with torch.inference_mode():
        layers = layers_with_inputs(str(folder), samples if recipe.needs_text else [])
        for done, methods in enumerate(layers, start=1):
            tensors, replaced = _convert_layer(methods, recipe, group_size, source.read)
            source.done |= replaced
            writer.add({name: source.like_before(name, tensor) for name, tensor in tensors.items()})
            report(done, config.num_layers)
        for name, tensor in source.remaining():
            writer.add({name: tensor})
    writer.finish()
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = quantization_config(recipe, group_size)
    for path in folder.iterdir():
        if path.suffix in COPIED and path.name not in ("config.json", INDEX_FILE):
            shutil.copy(path, out / path.name)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def quantization_config(recipe: Recipe, group_size: int) -> dict[str, Any]:
    if recipe.to == "awq":
        settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
        return settings | {"modules_to_not_convert": list(DENSE)}
    if recipe.to == "gptq":
        settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": recipe.act_order}
        return settings | {"sym": True, "lm_head": False, "checkpoint_format": "gptq", "true_sequential": False}
    if recipe.scheme == "block":
        settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        return settings | {"weight_block_size": [FP8_BLOCK, FP8_BLOCK], "modules_to_not_convert": list(DENSE)}
    kind = "float" if recipe.to == "fp8" else "int"
    values = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None, "observer": "minmax"}
    static = recipe.static_activations
    group = {
        "targets": ["Linear"],
        "weights": values | {"strategy": recipe.scheme, "dynamic": False},
        "input_activations": values | {"strategy": "tensor" if static else "token", "dynamic": not static},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [f"re:(.*\\.)?{name}$" for name in DENSE],
        "kv_cache_scheme": None,
    }


def fitting_group_size(group_size: int, shapes: dict[str, tuple[int, ...]]) -> int:
    """`group_size`, halved until it divides every layer's inputs; ConfigError where none does."""
    size = group_size
    for name, (outputs, inputs) in shapes.items():
        while inputs % size:
            size //= 2
            if size < MIN_GROUP_SIZE:
                raise ConfigError("group_size", group_size, f"no half of it divides the {inputs} inputs of {name}")
        if outputs % PER_WORD or inputs % PER_WORD:
            raise ConfigError("to", name, f"is {outputs}x{inputs}; 4-bit layouts pack multiples of {PER_WORD}")
    return size


def _check(folder: Path, config: ModelConfig, recipe: Recipe, out: Path, has_text: bool) -> None:
    if config.quantization is not None:
        raise ConfigError("model", str(folder), f"is quantized already ({config.quantization.description})")
    if recipe.needs_text and not has_text:
        what = recipe.to if recipe.to in ("awq", "gptq") else "static activation scales"
        raise ConfigError("calibration", None, f"{what} needs a text file like what the model is used for")
    if recipe.static_activations and config.mla is not None:
        reason = "kv_b_proj of latent attention is never applied here, so nothing is known of its inputs"
        raise ConfigError("static_activations", True, reason)
    if recipe.group_size < MIN_GROUP_SIZE:
        raise ConfigError("group_size", recipe.group_size, f"must be at least {MIN_GROUP_SIZE}")
    if recipe.scheme == "block" and (recipe.to != "fp8" or recipe.static_activations):
        raise ConfigError("scheme", "block", "is for fp8 with dynamic activation scales")
    if out.exists() and any(out.iterdir()):
        raise ConfigError("out", str(out), "is not empty")


# -- one decoder layer -----------------------------------------------------------------------------------


def _convert_layer(
    methods: list[RecordingMethod], recipe: Recipe, group_size: int, read: Read
) -> tuple[dict[str, Tensor], set[str]]:
    """New tensors by name, and the names replaced."""
    replaced = {f"{name}.weight" for method in methods for name in method.matrices}
    if recipe.to == "awq":
        tensors = _awq_layer(methods, group_size, read)
    elif recipe.to == "gptq":
        tensors = _gptq_layer(methods, group_size, recipe.act_order)
    else:
        tensors = _w8a8_layer(methods, recipe)
    return tensors, replaced | (tensors.keys() - replaced)


def _w8a8_layer(methods: list[RecordingMethod], recipe: Recipe) -> dict[str, Tensor]:
    dtype = FP8 if recipe.to == "fp8" else torch.int8
    tensors: dict[str, Tensor] = {}
    for method in methods:
        for name, weight in method.matrices.items():
            if recipe.scheme == "block":
                scale = _block_scales(weight, dtype)
                spread = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
                stored = quantize(weight, spread[: weight.shape[0], : weight.shape[1]], dtype)
                tensors[f"{name}.weight_scale_inv"] = scale
            else:
                if recipe.scheme == "channel":
                    stored, scale = quantize_groups(weight, 1, dtype)
                else:
                    scale = (weight.abs().max() / largest(dtype)).clamp(min=MIN_SCALE).reshape(1)
                    stored = quantize(weight, scale, dtype)
                tensors[f"{name}.weight_scale"] = scale
            tensors[f"{name}.weight"] = stored
            if recipe.static_activations:
                tensors[f"{name}.input_scale"] = torch.tensor([_largest_input(method, methods) / largest(dtype)])
    return tensors


def _largest_input(method: RecordingMethod, methods: list[RecordingMethod]) -> float:
    """For an expert without tokens, that of the others."""

    def projection(other: RecordingMethod) -> str:
        return next(iter(other.matrices)).rsplit(".", 1)[1]

    seen = [method] if method.num_tokens else [m for m in methods if projection(m) == projection(method)]
    return max(1e-6, *(m.largest for m in seen))


def _block_scales(weight: Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = (-size % FP8_BLOCK for size in weight.shape)
    padded = torch.nn.functional.pad(weight.abs(), (0, columns, 0, rows))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    return (blocks.amax((1, 3)) / largest(dtype)).clamp(min=MIN_SCALE)


def _gptq_layer(methods: list[RecordingMethod], group_size: int, act_order: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for method in methods:
        rounded = {
            name: round_gptq(weight, method.moment, group_size, act_order) for name, weight in method.matrices.items()
        }
        for name, result in rounded.items():
            tensors |= {
                f"{name}.qweight": pack_rows(result.stored.T),
                f"{name}.qzeros": pack_columns(result.zeros.T - 1),
                f"{name}.scales": result.scales.T,
                f"{name}.g_idx": result.groups.int(),
            }
        method.replace({name: result.values() for name, result in rounded.items()})
    return tensors


def _awq_layer(methods: list[RecordingMethod], group_size: int, read: Read) -> dict[str, Tensor]:
    weights = {name: weight for method in methods for name, weight in method.matrices.items()}
    moments = {name: method.moment for method in methods for name in method.matrices}
    changed: dict[str, Tensor] = {}

    def rescale(names: list[str], method: RecordingMethod) -> Tensor:
        factors = search_input_scales([weights[n] for n in names], method.magnitude, method.moment, group_size)
        for name in names:
            weights[name] = weights[name] * factors
            moments[name] = moments[name] / torch.outer(factors, factors)
        return factors

    for method in methods:  # what is divided here is rounded, with other factors on its inputs, below
        names = list(method.matrices)
        prefix, layer = _split(names[0])
        before = f"{prefix}.{ROWS_ABSORB.get(layer)}"
        if before in weights and weights[before].shape[0] == weights[names[0]].shape[1]:
            factors = rescale(names, method)
            weights[before] = weights[before] / factors[:, None]
            if (bias := read(f"{before}.bias")) is not None:
                changed[f"{before}.bias"] = bias / factors
    for method in methods:
        names = list(method.matrices)
        prefix = _split(names[0])[0]
        absorbs = NORM_ABSORBS.get(tuple(_split(name)[1] for name in names))
        if absorbs is not None and (values := read(f"{prefix}.{absorbs}.weight")) is not None:
            changed[f"{prefix}.{absorbs}.weight"] = values / rescale(names, method)

    for name, weight in weights.items():
        clip = None if name.endswith(NEVER_CLIPPED) else moments[name]
        changed |= _awq_tensors(name, round_awq(weight, group_size, clip))
    return changed


def _awq_tensors(name: str, result: Rounded) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": pack_columns(result.stored.T, AWQ_ORDER),
        f"{name}.qzeros": pack_columns(result.zeros.T, AWQ_ORDER),
        f"{name}.scales": result.scales.T,
    }


def _split(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj` → `model.layers.3`, `mlp.up_proj`."""
    *prefix, layer = name.split(".", 3)
    return ".".join(prefix), layer


# -- files -----------------------------------------------------------------------------------------------


class _Source:
    """The plain checkpoint; `done`: not to be copied."""

    def __init__(self, folder: Path) -> None:
        self._file_of = checkpoint_files(folder)
        self._open = {path: safe_open(str(path), framework="pt") for path in set(self._file_of.values())}
        self.done: set[str] = set()

    def read(self, name: str) -> Tensor | None:
        return self._read(name).float() if name in self._file_of else None

    def like_before(self, name: str, tensor: Tensor) -> Tensor:
        """In the source's dtype, unless quantized or new."""
        is_changed = name in self._file_of and tensor.dtype == torch.float32
        return (tensor.to(self._read(name).dtype) if is_changed else tensor).contiguous()

    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """[out, in] of the matrices to be quantized."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self._file_of:
            if name.startswith("model.layers.") and name.endswith(".weight") and not name.endswith(ROUTERS):
                shape = tuple(self._slice(name).get_shape())
                if len(shape) == 2:
                    shapes[name.removesuffix(".weight")] = shape
            elif name.startswith("model.layers.") and len(self._slice(name).get_shape()) == 3:
                raise ConfigError("model", name, "holds several experts in one tensor, which no quantized layout does")
        return shapes

    def remaining(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._file_of:
            if name not in self.done:
                yield name, self._read(name)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._slice(name)[...]
        return tensor

    def _slice(self, name: str) -> Any:
        return self._open[self._file_of[name]].get_slice(name)


class _ShardWriter:
    """Writes tensors to files of at most `shard_bytes`, or of one tensor."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            num_bytes = sum(t.nbytes for t in self._waiting.values())
            if self._waiting and num_bytes + tensor.nbytes > self._shard_bytes:
                self._write()
            self._waiting[name] = tensor

    def _write(self) -> None:
        file = self._unnamed(len(self._shards))
        save_file(self._waiting, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors keeps what it writes from everyone else
        self._total += sum(tensor.nbytes for tensor in self._waiting.values())
        self._shards.append(list(self._waiting))
        self._waiting = {}

    def _unnamed(self, number: int) -> Path:
        return self._folder / f"shard-{number}.unfinished"

    def finish(self) -> None:
        """Write the last tensors, then name the files."""
        self._write()
        count = len(self._shards)
        if count == 1:
            self._unnamed(0).rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._unnamed(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

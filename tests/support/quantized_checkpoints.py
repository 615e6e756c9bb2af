"""Checkpoints in the published quantized layouts, written value by value from the formats' descriptions, and what
transformers makes of the same numbers: nothing here uses the code under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Convert = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""(name of the layer, weight [out, in]) → tensors by suffix, and the weight that they stand for."""

FP8 = torch.float8_e4m3fn
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def write_quantized(source: Path, folder: Path, convert: Convert, config: dict[str, Any]) -> Path:
    """A copy of `source` with its layers' linear weights converted; `folder`/dense holds what they stand for."""
    quantized, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if tensor.dim() == 2 and layer.startswith("model.layers."):
            parts, value = convert(layer, tensor)
            quantized |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in parts.items()}
            dense[name] = value.contiguous()
        else:
            quantized[name] = dense[name] = tensor
    (folder / "dense").mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    (folder / "dense" / "config.json").write_text(json.dumps(raw))
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- 8 bits ----------------------------------------------------------------------------------------------


def round_to(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    if kind == "fp8":
        return (x / scale).clamp(-448, 448).to(FP8)
    return (x / scale).round().clamp(-127, 127).to(torch.int8)


def eight_bit(kind: str, weights: str, *, static: float | None = None, block: int = 128, names: str = "") -> Convert:
    """names: "hf" for the suffixes of Hugging Face's fp8, "" for those of compressed-tensors."""
    top = 448.0 if kind == "fp8" else 127.0

    def convert(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if weights == "tensor":
            scale = (weight.abs().max() / top).reshape(() if names == "hf" else (1,))
            spread = scale
        elif weights == "channel":
            scale = spread = weight.abs().amax(1, keepdim=True) / top
        else:
            rows, columns = weight.shape
            scale = torch.empty(-(-rows // block), -(-columns // block))
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    piece = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
                    scale[i, j] = piece.abs().max() / top
            spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        stored = round_to(weight, spread, kind)
        parts = {"weight": stored, "weight_scale_inv" if names == "hf" or weights == "block" else "weight_scale": scale}
        if static is not None:
            value = torch.tensor(static)
            parts["activation_scale" if names == "hf" else "input_scale"] = value if names == "hf" else value[None]
        return parts, stored.float() * spread

    return convert


def fp8_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | changes


def compressed_config(kind: str, weights: str, static: bool = False) -> dict[str, Any]:
    type_ = "float" if kind == "fp8" else "int"
    values = {"num_bits": 8, "type": type_, "symmetric": True, "group_size": None, "observer": "minmax"}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{type_}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": values | {"strategy": weights, "dynamic": False},
                "input_activations": values | {"strategy": "tensor" if static else "token", "dynamic": not static},
                "output_activations": None,
            }
        },
    }


# -- 4 bits ----------------------------------------------------------------------------------------------


def _words(nibbles: Any) -> Tensor:
    """[…, 8] values to […] words: value i at bits 4·i."""
    words = sum(nibbles[..., i].astype(np.uint32) << np.uint32(4 * i) for i in range(8))
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def _groups(weight: Tensor, group_of: list[int]) -> tuple[Any, Any, Any]:
    """uint values [in, out], zeros [groups, out] in 1..15, scales [groups, out] in half precision."""
    columns = weight.T.double().numpy()
    num_groups, out = max(group_of) + 1, columns.shape[1]
    stored = np.zeros(columns.shape, int)
    zeros, scales = np.zeros((num_groups, out), int), np.zeros((num_groups, out))
    for g in range(num_groups):
        members = [i for i, group in enumerate(group_of) if group == g]
        low, high = columns[members].min(0), columns[members].max(0)
        scales[g] = ((high - low) / 15).astype(np.float16)
        zeros[g] = np.clip(np.round(-low / scales[g]), 1, 15)
        stored[members] = np.clip(np.round(columns[members] / scales[g]) + zeros[g], 0, 15)
    return stored, zeros, scales


def _value(stored: Any, zeros: Any, scales: Any, group_of: list[int]) -> Tensor:
    return torch.tensor((stored - zeros[group_of]) * scales[group_of]).float().T


def awq(group_size: int) -> Convert:
    def convert(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        group_of = [i // size for i in range(weight.shape[1])]
        stored, zeros, scales = _groups(weight, group_of)

        def pack(values: Any) -> Tensor:
            return _words(values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER])

        parts = {"qweight": pack(stored), "qzeros": pack(zeros), "scales": torch.tensor(scales).half()}
        return parts, _value(stored, zeros, scales, group_of)

    return convert


def gptq(group_size: int, *, act_order: bool = False, version: int = 1) -> Convert:
    def convert(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = weight.shape[1]
        size = inputs if group_size == -1 else group_size
        group_of = [i // size for i in range(inputs)]
        if act_order:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(len(layer))).tolist()
            group_of = [group_of[i] for i in order]
        stored, zeros, scales = _groups(weight, group_of)
        less = 1 if version == 1 else 0
        parts = {
            "qweight": _words(stored.reshape(inputs // 8, 8, -1).swapaxes(1, 2)),
            "qzeros": _words((zeros - less).reshape(len(zeros), -1, 8)),
            "scales": torch.tensor(scales).half(),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        return parts, _value(stored, zeros, scales, group_of)

    return convert


def awq_config(group_size: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True} | changes


def gptq_config(group_size: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": False, "desc_act": False} | changes


# -- what transformers makes of it -----------------------------------------------------------------------


def reference_with_rounded_activations(
    dense: Path, ids: Sequence[int], kind: str, *, static: float | None = None, block: int | None = None, tp: int = 1
) -> Tensor:
    """Logits [T, vocab] of `dense` with the inputs of every linear layer rounded to 8 bits.

    With `tp` ranks, those of o_proj and down_proj are rounded rank by rank, as each sees only its own.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    top = 448.0 if kind == "fp8" else 127.0

    def rounded(x: Tensor) -> Tensor:
        scale = torch.tensor(static) if static else (x.abs().amax(-1, keepdim=True) / top).clamp(min=1e-12)
        return round_to(x, scale, kind).float() * scale

    def hook(name: str) -> Any:
        def before(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            size = x.shape[-1]
            cuts = {size // tp * r for r in range(tp)} if name.endswith(("o_proj", "down_proj")) else {0}
            cuts |= set(range(0, size, block)) if block else set()
            edges = [*sorted(cuts), size]
            pieces = [rounded(x[..., a:b]) for a, b in zip(edges, edges[1:], strict=False)]
            return (torch.cat(pieces, -1),)

        return before

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits

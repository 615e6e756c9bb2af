"""What a checkpoint's quantization_config is understood as, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from support.model_folder import write_model_folder

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.quantization import W4A16, W8A8, read_quantization

COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head", "re:.*mlp\\.gate$"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
    "global_compression_ratio": 1.5,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "output_activations": None,
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "backend": "autoawq"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True, "damp_percent": 0.01}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def compressed(**changes: Any) -> dict[str, Any]:
    """COMPRESSED with keys of its group changed, e.g. weights={"num_bits": 4}."""
    config = copy.deepcopy(COMPRESSED)
    for name, values in changes.items():
        config["config_groups"]["group_0"][name].update(values)
    return config


@pytest.mark.parametrize(
    "raw, expected",
    [
        (FP8, W8A8(kind="fp8", weights="block")),
        (FP8 | {"weight_block_size": None}, W8A8(kind="fp8", weights="tensor")),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            W8A8(kind="fp8", weights="tensor", static_activations=True),
        ),
        (COMPRESSED, W8A8(kind="int8", weights="channel")),
        (
            compressed(
                weights={"type": "float", "strategy": "tensor"},
                input_activations={"type": "float", "strategy": "tensor", "dynamic": False},
            ),
            W8A8(kind="fp8", weights="tensor", static_activations=True),
        ),
        (
            compressed(
                weights={"type": "float", "strategy": "block", "block_structure": [64, 32]},
                input_activations={"type": "float", "strategy": "group", "group_size": 32},
            ),
            W8A8(kind="fp8", weights="block", block=(64, 32)),
        ),
        (AWQ, W4A16(layout="awq", group_size=128)),
        (GPTQ, W4A16(layout="gptq", group_size=128, zero_offset=1)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1}, W4A16(layout="gptq", group_size=-1)),
    ],
)
def test_the_published_formats_are_understood(raw: dict[str, Any], expected: W8A8 | W4A16) -> None:
    quantization = read_quantization(raw)
    assert quantization is not None
    assert (quantization.method, quantization.format) == (raw["quant_method"], expected)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes': not supported; supported are fp8, compressed-tensors, awq"),
        ({"bits": 4}, "quant_method=None"),
        (AWQ | {"bits": 8}, "bits=8: must be one of 4"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic"),
        (GPTQ | {"group_size": 0}, "group_size=0"),
        (GPTQ | {"lm_head": True}, "lm_head=True"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme='static'"),
        (COMPRESSED | {"format": "pack-quantized"}, "format='pack-quantized'"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (COMPRESSED | {"config_groups": {}}, "config_groups"),
        (compressed(weights={"num_bits": 4}), "num_bits=4"),
        (compressed(weights={"symmetric": False}), "symmetric=False"),
        (compressed(weights={"strategy": "token"}), "strategy='token'"),
        (compressed(weights={"type": "float"}), "type='int'"),
        (compressed(input_activations={"strategy": "tensor"}), "strategy='tensor'"),
    ],
)
def test_what_would_change_the_answers_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_quantization(raw)


def test_layers_that_were_left_out_are_told_by_name() -> None:
    by_part = read_quantization(AWQ | {"modules_to_not_convert": ["layers.1", "lm_head"]})
    by_rule = read_quantization(COMPRESSED)
    assert by_part is not None and by_rule is not None
    assert by_part.covers("model.layers.10.mlp.up_proj")
    assert not by_part.covers("model.layers.1.mlp.up_proj")
    assert by_rule.covers("model.layers.0.mlp.gate_proj")
    assert not by_rule.covers("model.layers.0.mlp.gate")
    assert not by_rule.covers("lm_head")


@pytest.mark.parametrize(
    "found, asked, expected",
    [
        (None, "auto", None),
        (None, "fp8", W8A8(kind="fp8", online=True)),
        (None, "int8", W8A8(kind="int8", online=True)),
        (AWQ, "auto", W4A16(layout="awq", group_size=128)),
        (AWQ, "awq", W4A16(layout="awq", group_size=128)),
        (COMPRESSED, "int8", W8A8(kind="int8")),
        (COMPRESSED, "compressed-tensors", W8A8(kind="int8")),
    ],
)
def test_what_a_user_asks_for_meets_what_the_checkpoint_is(
    tmp_path: Path, found: Any, asked: Any, expected: W8A8 | W4A16 | None
) -> None:
    folder = write_model_folder(tmp_path, **({"quantization_config": found} if found else {}))
    config = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", quantization=asked))
    assert (config.quantization.format if config.quantization else None) == expected


@pytest.mark.parametrize(
    "found, asked, message",
    [
        (None, "awq", "not quantized; `stagemesh quantize MODEL --to awq"),
        (None, "compressed-tensors", "not quantized; fp8 and int8"),
        (AWQ, "fp8", "quantization='fp8': the checkpoint is awq 4-bit; auto takes it as it is"),
        ({"quant_method": "exl3"}, "auto", "quant_method='exl3': not supported.*config.json"),
    ],
)
def test_a_format_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, found: Any, asked: Any, message: str
) -> None:
    folder = write_model_folder(tmp_path, **({"quantization_config": found} if found else {}))
    with pytest.raises(ConfigError, match=message):
        EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", quantization=asked))


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="quantization='int3': must be one of auto, fp8, int8, awq, gptq"):
        EngineArgs(model="m", quantization="int3")  # type: ignore[arg-type]


def test_an_fp8_cache_holds_more_tokens(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    plain = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu"))
    small = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", kv_cache_dtype="fp8"))
    assert (plain.kv_dtype_bytes, small.kv_dtype_bytes) == (2, 1)

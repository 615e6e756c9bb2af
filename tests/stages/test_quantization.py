"""Quantized layers: checkpoints in the published layouts give what their numbers stand for, in every cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import Part, ThreadLane, make_checkpoint, reference_logits
from quantized_checkpoints import (
    awq,
    awq_config,
    compressed_config,
    eight_bit,
    fp8_config,
    gptq,
    gptq_config,
    reference_with_rounded_activations,
    write_quantized,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from stagemesh.config.errors import ConfigError

IDS = [5, 99, 17, 3, 64, 120, 8, 8, 77, 31, 2, 50, 13]
TABLE = [3, 1, 4, 0, 2]
LAYOUTS = [(1, None), (2, None), (1, (1, 2)), (2, (2, 1))]
layouts = pytest.mark.parametrize("tp, partition", LAYOUTS)

BLOCK = 32
EIGHT_BIT: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "fp8-tensor": (eight_bit("fp8", "tensor"), compressed_config("fp8", "tensor"), {"kind": "fp8"}),
    "fp8-channel": (eight_bit("fp8", "channel"), compressed_config("fp8", "channel"), {"kind": "fp8"}),
    "fp8-block": (
        eight_bit("fp8", "block", block=BLOCK, names="hf"),
        fp8_config(weight_block_size=[BLOCK, BLOCK]),
        {"kind": "fp8", "block": BLOCK},
    ),
    "fp8-static": (
        eight_bit("fp8", "tensor", static=0.05, names="hf"),
        fp8_config(activation_scheme="static"),
        {"kind": "fp8", "static": 0.05},
    ),
    "fp8-autofp8": (
        eight_bit("fp8", "tensor", static=0.05),
        fp8_config(activation_scheme="static", ignored_layers=["lm_head"]),
        {"kind": "fp8", "static": 0.05},
    ),
    "int8-tensor": (eight_bit("int8", "tensor"), compressed_config("int8", "tensor"), {"kind": "int8"}),
    "int8-channel": (eight_bit("int8", "channel"), compressed_config("int8", "channel"), {"kind": "int8"}),
    "int8-static": (
        eight_bit("int8", "channel", static=0.1),
        compressed_config("int8", "channel", static=True),
        {"kind": "int8", "static": 0.1},
    ),
}
FOUR_BIT: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (awq(32), awq_config(32)),
    "awq-one-group": (awq(-1), awq_config(-1)),
    "gptq": (gptq(32), gptq_config(32)),
    "gptq-v2": (gptq(32, version=2), gptq_config(32, checkpoint_format="gptq_v2")),
    "gptq-act-order": (gptq(16, act_order=True), gptq_config(16, desc_act=True)),
    "gptq-one-group": (gptq(-1), gptq_config(-1)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            convert, config = (EIGHT_BIT | FOUR_BIT)[name][:2]
            made[name] = write_quantized(source, tmp_path_factory.mktemp(name) / "model", convert, config)
        return made[name]

    return get


def run(folder: Path, tp: int = 1, partition: tuple[int, ...] | None = None, **args: Any) -> Tensor:
    """Logits of IDS, the last three of them in a second step."""
    lane = ThreadLane(folder, tp=tp, partition=partition, args=args)
    return torch.cat((lane.logits(Part(IDS[:10], 0, TABLE)), lane.logits(Part(IDS[10:], 10, TABLE))))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Of the logits, relative to their spread."""
    return float((ours - theirs).norm() / theirs.norm())


@layouts
@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bit_weights_are_the_numbers_that_they_stand_for(
    quantized: Any, name: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    folder = quantized(name)
    expected = reference_logits(folder / "dense", IDS)
    torch.testing.assert_close(run(folder, tp, partition), expected, atol=1e-4, rtol=0)


@layouts
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bit_layers_round_weights_and_activations_and_nothing_else(
    quantized: Any, name: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    folder = quantized(name)
    expected = reference_with_rounded_activations(folder / "dense", IDS, **EIGHT_BIT[name][2], tp=tp)
    # Sums in another order now and then round an activation to its other neighbour.
    assert error(run(folder, tp, partition), expected) < 2e-2
    assert error(reference_logits(folder / "dense", IDS), expected) > 1e-3  # it matters that activations are rounded


@layouts
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_plain_checkpoint_is_quantized_while_it_is_loaded(
    source: Path, quantized: Any, kind: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    ours = run(source, tp, partition, quantization=kind)
    if tp == 1:
        assert error(ours, run(quantized(f"{kind}-channel"), tp, partition)) < 1e-6
    assert error(ours, reference_logits(source, IDS)) < (0.3 if kind == "fp8" else 0.1)


def test_more_ranks_than_kv_heads_and_biases_work_quantized(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", attention_bias=True, mlp_bias=True)
    for name in ("awq", "gptq-act-order"):
        convert, config = FOUR_BIT[name]
        folder = write_quantized(source, tmp_path / name, convert, config)
        expected = reference_logits(folder / "dense", IDS)
        torch.testing.assert_close(run(folder, 4), expected, atol=1e-4, rtol=0)


def test_a_rank_holds_only_its_part_of_packed_weights(quantized: Any) -> None:
    for name in ("awq", "gptq", "fp8-channel"):
        whole, part = ThreadLane(quantized(name)), ThreadLane(quantized(name), tp=2)
        for pick in (lambda m: m.layers[0].attention.out, lambda m: m.layers[0].feed_forward.gate_up):
            sizes = [
                sum(piece.weight.nbytes for piece in pick(lane.stages[0][0]._loaded()).method.pieces)
                for lane in (whole, part)
            ]
            assert sizes[0] == 2 * sizes[1]


def test_layers_that_the_checkpoint_left_out_stay_dense(source: Path, tmp_path: Path) -> None:
    def convert(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return ({"weight": weight}, weight) if "layers.1.mlp" in layer else awq(32)(layer, weight)

    config = awq_config(32, modules_to_not_convert=["layers.1.mlp"])
    folder = write_quantized(source, tmp_path / "model", convert, config)
    torch.testing.assert_close(run(folder, 2), reference_logits(folder / "dense", IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, tensor", [("fp8-channel", "weight_scale"), ("awq", "qzeros"), ("gptq", "scales")])
def test_a_missing_quantized_tensor_is_named(quantized: Any, tmp_path: Path, name: str, tensor: str) -> None:
    folder = quantized(name)
    missing = f"model.layers.1.mlp.up_proj.{tensor}"
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=missing):
        ThreadLane(tmp_path)


def test_quantized_numbers_are_never_taken_for_plain_ones(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("int8-channel")
    config = (folder / "config.json").read_text().replace('"lm_head"', '"re:.*mlp.*", "lm_head"')
    (tmp_path / "config.json").write_text(config)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"gate_proj\.weight' .* holds int8, config\.json asks for float32"):
        ThreadLane(tmp_path)


@layouts
def test_an_fp8_cache_gives_nearly_the_same_answers_in_a_quarter_of_the_room(
    source: Path, tp: int, partition: tuple[int, ...] | None
) -> None:
    expected = reference_logits(source, IDS)
    ours = run(source, tp, partition, kv_cache_dtype="fp8")
    assert 1e-4 < error(ours, expected) < 0.1
    plain = ThreadLane(source, tp=tp, partition=partition).stages[0][0]
    small = ThreadLane(source, tp=tp, partition=partition, args={"kv_cache_dtype": "fp8"}).stages[0][0]
    assert plain.kv_bytes_per_block() == 4 * small.kv_bytes_per_block()


MIXTURE = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {},
    "Mixtral": MIXTURE | {"num_local_experts": 4},
    "Qwen2Moe": MIXTURE
    | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    "Qwen3Moe": MIXTURE | {"num_experts": 4, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("name", ["fp8-channel", "fp8-block", "int8-channel", "awq", "gptq-act-order"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_every_format_and_cut(tmp_path: Path, family: str, name: str) -> None:
    convert, config = (EIGHT_BIT | FOUR_BIT)[name][:2]

    def convert_all_but_routers(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return ({"weight": weight}, weight) if layer.endswith("gate") else convert(layer, weight)

    source = make_checkpoint(tmp_path / "source", family, **FAMILIES[family])
    folder = write_quantized(source, tmp_path / "model", convert_all_but_routers, config)
    expected = reference_logits(folder / "dense", IDS)
    cuts: list[tuple[int, Any, bool]] = [(1, None, False), (2, (2, 1), False)]
    if "num_experts_per_tok" in FAMILIES[family]:
        cuts.append((2, None, True))
    for tp, partition, by_experts in cuts:
        ours = run(folder, tp, partition, enable_expert_parallel=by_experts)
        if name in FOUR_BIT:
            torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
        else:
            assert 1e-3 < error(ours, expected) < 0.4

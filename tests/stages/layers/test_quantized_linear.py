"""Quantized layers: checkpoints in the published layouts give what their numbers stand for, in every cut."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.matrix import FAMILIES, FORMATS, has_experts
from support.model_harness import Part, ThreadLane, make_checkpoint, reference_logits
from support.quantized_checkpoints import (
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
from torch import Tensor

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.kernels.quant_w8a8 import dequantize
from stagemesh.stages.layers import quantized_linear as methods
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.latent_attention import LatentAttention
from stagemesh.stages.layers.linear import WeightShard

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
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Path:
        convert, config = (EIGHT_BIT | FOUR_BIT)[name][:2]
        return write_quantized(source, tmp_path_factory.mktemp(name) / "model", convert, config)

    return make


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


@pytest.mark.parametrize("name", EIGHT_BIT | FOUR_BIT)
def test_a_method_gives_its_weights_as_floats(quantized: Any, name: str) -> None:
    folder, layer = quantized(name), "model.layers.0.mlp.down_proj"
    config = EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu"))
    part = WeightShard(layer, 64, 96, slice(5, 40), slice(20, 70))
    method = methods.linear_methods(config.quantization)(layer)
    with Checkpoint(folder, torch.float32) as checkpoint:
        method.load(checkpoint, [part], with_bias=False)
    expected = load_file(folder / "dense" / "model.safetensors")[f"{layer}.weight"][5:40, 20:70]
    torch.testing.assert_close(method.dequantize(), expected, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("family", ["DeepSeek-V2", "DeepSeek-V3"])
def test_an_fp8_cache_holds_latents_too(of_family: Any, family: str) -> None:
    folder = of_family(family, "plain")
    assert 1e-4 < error(run(folder, 2, kv_cache_dtype="fp8"), reference_logits(folder, IDS)) < 0.2


# -- every family ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family in a format; that of the plain checkpoint for "plain"."""

    @functools.cache
    def make(family: str, name: str) -> Path:
        folder = tmp_path_factory.mktemp("family") / "model"
        if name == "plain":
            return make_checkpoint(folder, FAMILIES[family][0], **FAMILIES[family][1])
        convert, config = (EIGHT_BIT | FOUR_BIT)[name][:2]
        return write_quantized(make(family, "plain"), folder, all_but_routers(convert), config)

    return make


def all_but_routers(convert: Any) -> Any:
    def convert_most(layer: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return ({"weight": weight}, weight) if layer.endswith("gate") else convert(layer, weight)

    return convert_most


def cuts(family: str) -> list[tuple[int, Any, bool]]:
    """TP, layers per stage, and whether experts are kept whole."""
    plain: list[tuple[int, Any, bool]] = [(1, None, False), (2, None, False), (1, (2, 1), False), (2, (2, 1), False)]
    return plain + ([(2, None, True), (2, (1, 2), True)] if has_experts(family) else [])


CELLS = [(family, name) for family in FAMILIES for names in FORMATS.values() for name in names]


@pytest.mark.parametrize("family, name", [cell for cell in CELLS if not cell[1].startswith("online")])
def test_every_family_loads_every_format_in_every_cut(
    of_family: Any, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights alone are rounded here, so that what is loaded can be compared to the last bit but some."""
    monkeypatch.setattr(methods, "w8a8_linear", linear_with_plain_activations)
    folder = of_family(family, name)
    expected = reference_logits(folder / "dense", IDS)
    for tp, partition, by_experts in cuts(family):
        ours = run(folder, tp, partition, enable_expert_parallel=by_experts)
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family, name", [cell for cell in CELLS if cell[1] not in FOUR_BIT])
def test_every_family_computes_in_8_bits_in_every_cut(of_family: Any, family: str, name: str) -> None:
    online = name.removeprefix("online-") if name.startswith("online") else "auto"
    folder = of_family(family, name if online == "auto" else "plain")
    expected = reference_logits(folder / "dense" if online == "auto" else folder, IDS)
    for tp, partition, by_experts in cuts(family):
        ours = run(folder, tp, partition, enable_expert_parallel=by_experts, quantization=online)
        assert 1e-3 < error(ours, expected) < 0.4


BAD = 100
"""A token whose embedding is NaN where a test says so."""


def beside(lane: ThreadLane, neighbour: list[int]) -> tuple[Tensor, list[int]]:
    """Logits and greedy answer of a sequence whose steps it shares with `neighbour`: a prefill, a chunk, decodes."""
    logits, answer = [], []
    token_ids, start = IDS[:6], 0
    others, behind = neighbour[:4], 0
    for _ in range(6):
        parts = Part(others, behind, [9, 8, 7, 6, 5]), Part(token_ids, start, TABLE)
        logits.append(lane.logits(*parts)[len(others) :])
        answer.append(lane.sample(*parts)[1])
        start, behind = start + len(token_ids), behind + len(others)
        token_ids = IDS[6:] if start == 6 else answer[-1:]
        others = neighbour[behind : behind + (3 if behind == 4 else 1)]
    return torch.cat(logits), answer


NAN_CELLS = [(family, "plain") for family in FAMILIES]
NAN_CELLS += [("Llama 2, 3.x", name) for name in [*EIGHT_BIT, *FOUR_BIT]]
# Experts see other rows together then, and 8 bits may round a sum in another order to another neighbour.
NAN_CELLS += [(family, name) for family in ("Qwen2-MoE", "DeepSeek-V3") for name in FOUR_BIT]


@pytest.mark.parametrize("family, name", NAN_CELLS)
def test_a_row_of_nan_leaves_the_rows_beside_it_as_they_are(of_family: Any, way: str, family: str, name: str) -> None:
    folder = of_family(family, name)
    for tp, partition, by_experts in cuts(family)[:2] + cuts(family)[4:5]:
        lane = ThreadLane(folder, tp, partition, args={"enable_expert_parallel": by_experts})
        expected, expected_answer = beside(lane, neighbour := [BAD, 3, 5, 7, 9, 11, 13, BAD, 17, 19, 23])
        for runner in lane.stages[0]:
            embedding = runner._loaded().embedding
            assert embedding is not None
            if embedding.start <= BAD < embedding.end:
                embedding.weight = embedding.weight.clone()
                embedding.weight[BAD - embedding.start] = torch.nan
        assert not lane.logits(Part([BAD], 0, [9])).isfinite().any() or "static" in name or "autofp8" in name
        logits, answer = beside(lane, neighbour)
        torch.testing.assert_close(logits, expected, atol=1e-4 if has_experts(family) else 0, rtol=0)
        assert answer == expected_answer


@pytest.mark.parametrize("tp, partition, by_experts", cuts("DeepSeek-V3"))
def test_deepseek_v3_loads_in_blocks_of_128_as_it_is_published(
    tmp_path: Path, tp: int, partition: tuple[int, ...] | None, by_experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of several blocks, the last ones not whole, and cuts through the middle of a block."""
    monkeypatch.setattr(methods, "w8a8_linear", linear_with_plain_activations)
    sizes = {"hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 192, "q_lora_rank": 160}
    sizes |= {"kv_lora_rank": 136, "qk_nope_head_dim": 24, "v_head_dim": 24}
    cls, settings = FAMILIES["DeepSeek-V3"]
    source = make_checkpoint(tmp_path / "source", cls, **(settings | sizes))
    convert = all_but_routers(eight_bit("fp8", "block", names="hf"))
    folder = write_quantized(source, tmp_path / "fp8", convert, fp8_config(weight_block_size=[128, 128]))
    ours = run(folder, tp, partition, enable_expert_parallel=by_experts)
    assert error(ours, reference_logits(folder / "dense", IDS)) < 1e-5


def test_latent_attention_does_not_round_its_weights_to_a_scale_of_activations(tmp_path: Path) -> None:
    """It takes the matrix of kv_b_proj apart, which is not what a static scale was measured for."""
    cls, settings = FAMILIES["DeepSeek-V3"]
    source = make_checkpoint(tmp_path / "source", cls, **settings)
    convert = all_but_routers(eight_bit("fp8", "tensor", static=0.03, names="hf"))
    folder = write_quantized(source, tmp_path / "fp8", convert, fp8_config(activation_scheme="static"))
    attention = ThreadLane(folder).stages[0][0]._loaded().layers[0].attention
    assert isinstance(attention, LatentAttention)
    dense = load_file(folder / "dense" / "model.safetensors")["model.layers.0.self_attn.kv_b_proj.weight"]
    key, value = dense.unflatten(0, (8, -1)).split([16, 8], 1)
    torch.testing.assert_close(attention.key, key, atol=1e-6, rtol=0)
    torch.testing.assert_close(attention.value, value.transpose(1, 2), atol=1e-6, rtol=0)


def linear_with_plain_activations(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None) -> Tensor:
    return x @ dequantize(weight, scale).T

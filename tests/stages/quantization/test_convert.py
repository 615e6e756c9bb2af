"""Making quantized checkpoints: what is written is what the source was, to the format's precision, in its layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.matrix import FAMILIES
from support.model_harness import Part, ThreadLane, make_checkpoint, reference_logits
from torch import Tensor

from stagemesh.config.errors import ConfigError
from stagemesh.stages.layers.mlp import GatedMLP
from stagemesh.stages.quantization.convert import Recipe, fitting_group_size, quantize_checkpoint
from stagemesh.stages.quantization.rounding import output_error, round_awq, round_gptq, search_input_scales

IDS = [5, 99, 17, 3, 64, 120, 8, 8, 77, 31, 2, 50, 13]
TABLE = [3, 1, 4, 0, 2]
TEXT = [torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)]

RECIPES: dict[str, tuple[Recipe, float]] = {
    "fp8": (Recipe(to="fp8"), 0.3),
    "fp8-tensor": (Recipe(to="fp8", scheme="tensor"), 0.3),
    "fp8-block": (Recipe(to="fp8", scheme="block"), 0.3),
    "fp8-static": (Recipe(to="fp8", scheme="tensor", static_activations=True), 0.3),
    "int8": (Recipe(to="int8"), 0.1),
    "int8-static": (Recipe(to="int8", static_activations=True), 0.2),
    "awq": (Recipe(to="awq", group_size=16), 0.7),
    "gptq": (Recipe(to="gptq", group_size=16), 0.7),
    "gptq-act-order": (Recipe(to="gptq", group_size=16, act_order=True), 0.7),
}
"""And the largest error of the logits. Random weights forgive little: nothing in them is redundant."""


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        quantize_checkpoint(str(source), folder, RECIPES[name][0], TEXT)
        return folder

    return make


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("tp, partition", [(1, None), (2, None), (2, (1, 2))])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_loads_and_answers_nearly_as_the_source(
    source: Path, converted: Any, name: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    ours = ThreadLane(converted(name), tp=tp, partition=partition).logits(Part(IDS, 0, TABLE))
    assert 1e-4 < error(ours, reference_logits(source, IDS)) < RECIPES[name][1]


@pytest.mark.parametrize(
    "name, tensors",
    [
        ("fp8", {"weight": ("float8_e4m3fn", (96, 64)), "weight_scale": ("float32", (96, 1))}),
        ("fp8-tensor", {"weight": ("float8_e4m3fn", (96, 64)), "weight_scale": ("float32", (1,))}),
        ("fp8-block", {"weight": ("float8_e4m3fn", (96, 64)), "weight_scale_inv": ("float32", (1, 1))}),
        (
            "int8-static",
            {"weight": ("int8", (96, 64)), "weight_scale": ("float32", (96, 1)), "input_scale": ("float32", (1,))},
        ),
        (
            "awq",
            {"qweight": ("int32", (64, 12)), "qzeros": ("int32", (4, 12)), "scales": ("float16", (4, 96))},
        ),
        (
            "gptq",
            {
                "qweight": ("int32", (8, 96)),
                "qzeros": ("int32", (4, 12)),
                "scales": ("float16", (4, 96)),
                "g_idx": ("int32", (64,)),
            },
        ),
    ],
)
def test_the_tensors_are_those_of_the_published_layout(converted: Any, name: str, tensors: dict[str, Any]) -> None:
    prefix = "model.layers.1.mlp.up_proj."
    written = {
        key.removeprefix(prefix): (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in load_file(converted(name) / "model.safetensors").items()
        if key.startswith(prefix)
    }
    assert written == tensors


def test_only_act_order_mixes_the_groups(converted: Any) -> None:
    name = "model.layers.1.mlp.down_proj.g_idx"
    in_order = load_file(converted("gptq") / "model.safetensors")[name]
    by_importance = load_file(converted("gptq-act-order") / "model.safetensors")[name]
    assert in_order.tolist() == [i // 16 for i in range(96)]
    assert by_importance.tolist() != in_order.tolist()
    assert sorted(by_importance.tolist()) == in_order.tolist()


def test_biases_and_shards_survive(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", attention_bias=True, mlp_bias=True, num_key_value_heads=8)
    expected = reference_logits(source, IDS)
    for to in ("awq", "fp8"):
        out = tmp_path / to
        quantize_checkpoint(str(source), out, Recipe(to=to, group_size=16), TEXT, shard_bytes=30_000)
        assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
        assert error(ThreadLane(out, tp=2).logits(Part(IDS, 0, TABLE)), expected) < 0.7


@pytest.mark.parametrize(
    "recipe, text, message",
    [
        (Recipe(to="awq"), [], "calibration=None: awq needs a text file"),
        (Recipe(to="fp8", static_activations=True), [], "calibration=None: static activation scales"),
        (Recipe(to="int8", scheme="block"), [], "scheme='block': is for fp8"),
        (Recipe(to="awq", group_size=4), TEXT, "group_size=4: must be at least 8"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, recipe: Recipe, text: list[list[int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(str(source), tmp_path / "out", recipe, text)
    assert not (tmp_path / "out").exists()


def test_static_scales_are_not_for_latent_attention(tmp_path: Path) -> None:
    cls, settings = FAMILIES["DeepSeek-V3"]
    source = make_checkpoint(tmp_path / "source", cls, **settings)
    with pytest.raises(ConfigError, match="static_activations=True: kv_b_proj of latent attention"):
        quantize_checkpoint(str(source), tmp_path / "out", Recipe(to="fp8", static_activations=True), TEXT)


def test_a_quantized_model_is_not_quantized_again(converted: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is quantized already \(compressed-tensors int8\)"):
        quantize_checkpoint(str(converted("int8")), tmp_path / "out", Recipe(to="fp8"), [])


def test_a_folder_with_something_in_it_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        quantize_checkpoint(str(source), tmp_path, Recipe(to="fp8"), [])


def test_groups_shrink_until_they_divide_every_layer() -> None:
    assert fitting_group_size(128, {"a": (256, 256), "b": (256, 640)}) == 128
    assert fitting_group_size(128, {"a": (64, 64), "b": (64, 96)}) == 32
    with pytest.raises(ConfigError, match="100 inputs of a"):
        fitting_group_size(128, {"a": (64, 100)})
    with pytest.raises(ConfigError, match="60x64"):
        fitting_group_size(128, {"a": (60, 64)})


# -- rounding ----------------------------------------------------------------------------------------------


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [48, 64], and mean |x| and H of inputs some of which are ten times as large, and depend on others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8
    x[:, :6] *= 10
    return torch.randn(48, 64, generator=generator), x.abs().mean(0), x.T @ x / len(x)


@pytest.mark.parametrize("seed", range(3))
def test_knowing_the_inputs_lowers_the_error_of_the_output(seed: int) -> None:
    weight, magnitude, moment = layer(seed)
    plain = output_error(round_awq(weight, 16).values() - weight, moment)
    clipped = output_error(round_awq(weight, 16, moment).values() - weight, moment)
    factors = search_input_scales([weight], magnitude, moment, 16)
    scaled = output_error(round_awq(weight * factors, 16).values() / factors - weight, moment)
    gptq = output_error(round_gptq(weight, moment, 16).values() - weight, moment)
    ordered = output_error(round_gptq(weight, moment, 16, act_order=True).values() - weight, moment)
    assert clipped < plain
    assert scaled < 0.8 * plain
    assert gptq < 0.8 * plain
    assert ordered < 0.8 * plain


def test_rounding_finds_weights_that_four_bits_can_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    moment = layer(0)[2]
    grid = torch.randint(0, 16, (8, 64), generator=generator)
    grid[:, ::16], grid[:, 1::16] = 0, 15  # so that every group uses the whole range
    weight = (grid - 8) * 0.25
    torch.testing.assert_close(round_awq(weight, 16).values(), weight)
    # GPTQ's groups are symmetric, so that their largest weight does not quite reach the end of the range.
    assert (round_gptq(weight, moment, 16).values() - weight).abs().max() < 0.5


def test_weights_of_one_sign_are_not_clipped() -> None:
    """Values are counted from a zero between 0 and 15, so the range of a group must hold the number 0."""
    weight = 3 + torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    for signed in (weight, -weight):
        rounded = round_awq(signed, 16)
        assert (rounded.values() - signed).abs().max() <= 0.51 * float(rounded.scales.max())


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-block", "int8", "awq", "gptq"])
def test_a_matrix_of_zeros_stays_zeros(tmp_path: Path, name: str) -> None:
    source = make_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(str(source), tmp_path / "out", RECIPES[name][0], TEXT)
    (runner,) = ThreadLane(tmp_path / "out").stages[0]
    feed_forward = runner._loaded().layers[1].feed_forward
    assert isinstance(feed_forward, GatedMLP)
    assert torch.equal(feed_forward.gate_up.method.dequantize()[96:], torch.zeros(96, 64))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, _, moment = layer(0)
    moment[3], moment[:, 3] = 0, 0
    assert round_gptq(weight, moment, 16).values().isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fp8", "int8", "awq", "gptq"])
def test_every_family_is_quantized_but_for_its_head_and_routers(tmp_path: Path, family: str, name: str) -> None:
    cls, settings = FAMILIES[family]
    source = make_checkpoint(tmp_path / "source", cls, **settings)
    recipe, may_err = RECIPES[name]
    if family.startswith("DeepSeek"):
        may_err += 0.1  # rounding now and then moves a token to other experts
    quantize_checkpoint(str(source), tmp_path / "out", recipe, TEXT)
    expected = reference_logits(source, IDS)
    for tp in (1, 2):
        ours = ThreadLane(tmp_path / "out", tp=tp).logits(Part(IDS, 0, TABLE))
        assert 1e-4 < error(ours, expected) < may_err
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    plain = {n for n in names if n.endswith(".weight") and f"{n}_scale" not in names and "norm" not in n}
    assert {n for n in plain if not n.endswith("gate.weight")} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_an_expert_that_no_token_went_to_gets_the_scale_of_the_others(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "Mixtral", num_local_experts=8, num_experts_per_tok=1)
    quantize_checkpoint(str(source), tmp_path / "out", Recipe(to="int8", static_activations=True), [[5, 99, 17]])
    scales = {n: float(t) for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if "input_scale" in n}
    for layer in range(3):
        for side in ("w1", "w2", "w3"):
            of_experts = [v for n, v in scales.items() if n.startswith(f"model.layers.{layer}.") and f".{side}." in n]
            assert len(of_experts) == 8 and min(of_experts) > max(of_experts) / 100

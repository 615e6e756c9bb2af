from __future__ import annotations

import pytest
from support.model_configs import known_model

from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.quantization import resolve_quantization
from stagemesh.config.weights import num_parameters, weight_bytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-8b", 8.03),
        ("llama-70b", 70.55),
        ("llama-405b", 405.85),
        ("qwen3-30b-a3b", 30.53),
        ("mixtral-8x7b", 46.70),
        ("deepseek-v3", 671.03),
    ],
)
def test_parameters_are_those_that_the_makers_count(name: str, billions: float) -> None:
    assert num_parameters(known_model(name)) / 1e9 == pytest.approx(billions, abs=0.01)


def _bytes(
    model: ModelConfig, tp: int, pp: int, quantization: str = "auto", expert_parallel: bool = False
) -> list[int]:
    plan = ParallelPlan.resolve(model, tp, pp, expert_parallel=expert_parallel)
    stored = resolve_quantization(quantization, model.quantization)  # type: ignore[arg-type]
    return [weight_bytes(model, plan, stage, 2, stored) for stage in range(pp)]


def test_70b_is_140_gb_35_on_each_of_four_and_about_75_in_fp8() -> None:
    model = known_model("llama-70b")
    assert _bytes(model, 1, 1)[0] / 1e9 == pytest.approx(141.1, abs=0.1)
    assert _bytes(model, 4, 1)[0] / 1e9 == pytest.approx(35.3, abs=0.1)
    assert _bytes(model, 1, 1, "fp8")[0] / 1e9 == pytest.approx(75, rel=0.05)
    assert _bytes(known_model("llama-405b"), 1, 1, "fp8")[0] / 1e9 == pytest.approx(400, rel=0.05)


def test_stages_and_ranks_together_hold_the_model() -> None:
    model = known_model("llama-70b")
    whole = _bytes(model, 1, 1)[0]
    assert sum(_bytes(model, 1, 8)) == whole
    # Norms are on every rank; nothing else is.
    assert 0 < 4 * _bytes(model, 4, 1)[0] - whole < 10e6


def test_experts_are_cut_or_dealt_and_take_the_same_room() -> None:
    model = known_model("mixtral-8x7b")
    assert _bytes(model, 4, 1, expert_parallel=True) == _bytes(model, 4, 1)
    # Of 8 experts over 3 ranks, had it 30 heads, the first would hold 3.
    odd = known_model("mixtral-8x7b", num_attention_heads=30, num_key_value_heads=6, head_dim=128)
    rank = _bytes(odd, 3, 1, expert_parallel=True)[0]
    one_expert = 32 * 3 * 4096 * 14336 * 2
    assert 3 * one_expert < rank < 3.2 * one_expert

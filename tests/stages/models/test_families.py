"""Every family against transformers: float32 logits and greedy tokens, over layouts and ways of computing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.matrix import FAMILIES, has_experts, readme_table
from support.model_harness import (
    LAYOUTS,
    Part,
    ThreadLane,
    assert_same_logits,
    check_against_transformers,
    make_checkpoint,
    reference_logits,
    some_token_ids,
)

from stagemesh.config.errors import ConfigError
from stagemesh.config.families import FAMILIES as REGISTERED

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
}
AWKWARD = {"vocab_size": 101}
"""No number of ranks divides the vocabulary; 3 layers, which no number of stages divides, have all models here."""
THREE_KV_HEADS = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, tied, odd vocabulary": ("Llama", AWKWARD | {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 20}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "llama, dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama, yarn with attention factor": (
        "Llama",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}},
    ),
    "llama, yarn with mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
    "llama, no groups": ("Llama", {"num_key_value_heads": 8}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3, all at once": (
        "Qwen3",
        AWKWARD | {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "mixtral, 5 experts": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 11}),
    "qwen2-moe, 7 experts": ("Qwen2Moe", FAMILIES["Qwen2-MoE"][1] | {"num_experts": 7, "norm_topk_prob": True}),
    "qwen3-moe, every other layer": ("Qwen3Moe", FAMILIES["Qwen3-MoE"][1] | {"decoder_sparse_step": 2}),
    "qwen3-moe, normed": ("Qwen3Moe", FAMILIES["Qwen3-MoE"][1] | {"norm_topk_prob": True}),
    "deepseek-v2, lite": ("DeepseekV2", FAMILIES["DeepSeek-V2"][1] | {"q_lora_rank": None, "topk_method": "greedy"}),
}
for family, (cls, settings) in FAMILIES.items():
    if family.startswith("DeepSeek"):
        yarn = YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}
        sizes = {"kv_lora_rank": 22, "q_lora_rank": 26, "qk_nope_head_dim": 10, "v_head_dim": 14}
        VARIANTS[f"{family}, yarn, awkward sizes"] = (cls, settings | AWKWARD | sizes | {"rope_parameters": yarn})
    else:
        VARIANTS[f"{family}, 3 kv heads"] = (cls, settings | AWKWARD | THREE_KV_HEADS)
        VARIANTS[f"{family}, 1 kv head"] = (cls, settings | AWKWARD | {"num_key_value_heads": 1})
MIXTURES = [name for name, (_, settings) in VARIANTS.items() if "num_experts_per_tok" in settings]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a variant."""

    @functools.cache
    def make(name: str) -> Path:
        family, settings = VARIANTS[name]
        return make_checkpoint(tmp_path_factory.mktemp("variant"), family, **settings)

    return make


def test_the_readme_shows_what_is_tested() -> None:
    assert readme_table() in (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert {f"{cls}ForCausalLM" for cls, _ in FAMILIES.values()} == REGISTERED.keys()


@pytest.mark.parametrize("tp, partition", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_family_agrees_with_transformers(
    checkpoint: Any, name: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    check_against_transformers(checkpoint(name), tp, partition)


@pytest.mark.parametrize("tp, partition", [(1, None), (2, None), (2, (2, 1))])
@pytest.mark.parametrize("name", MIXTURES)
def test_expert_parallel_ranks_agree_with_transformers(
    checkpoint: Any, name: str, tp: int, partition: tuple[int, ...] | None, way: str
) -> None:
    check_against_transformers(checkpoint(name), tp, partition, enable_expert_parallel=True)


@pytest.mark.parametrize("name", ["mixtral, 5 experts", "qwen2-moe, 7 experts", "DeepSeek-V3"])
def test_more_expert_parallel_ranks_agree_too(checkpoint: Any, name: str, way: str) -> None:
    check_against_transformers(checkpoint(name), 4, None, enable_expert_parallel=True)


@pytest.mark.parametrize("tp, partition", [(4, None), (1, (1, 2)), (2, (1, 1, 1)), (4, (2, 1))])
@pytest.mark.parametrize("name", ["Llama 2, 3.x", "llama, tied, odd vocabulary", "llama, biases", "qwen3, all at once"])
def test_other_cuts_agree_too(checkpoint: Any, name: str, tp: int, partition: tuple[int, ...] | None) -> None:
    check_against_transformers(checkpoint(name), tp, partition)


@pytest.mark.parametrize("name, tp", [("Mistral", 4), ("Llama 2, 3.x, 1 kv head", 4), ("Llama 2, 3.x, 3 kv heads", 3)])
def test_more_ranks_than_kv_heads_hold_copies(checkpoint: Any, name: str, tp: int) -> None:
    check_against_transformers(checkpoint(name), tp, None)
    check_against_transformers(checkpoint(name), tp, (2, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path, family: str) -> None:
    """With all experts chosen: otherwise rounding now and then changes the choice, and with it everything."""
    cls, settings = FAMILIES[family]
    if has_experts(family):
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        every = next(settings[name] for name in names if name in settings)
        settings = settings | {"num_experts_per_tok": every, "topk_group": settings.get("n_group")}
    folder = make_checkpoint(tmp_path, cls, **settings)
    lane = ThreadLane(folder, tp=2, args={"dtype": "bfloat16", "enable_expert_parallel": has_experts(family)})
    ids, table = some_token_ids(60, seed=34), list(range(15))
    expected = reference_logits(folder, ids)
    theirs = reference_logits(folder, ids, torch.bfloat16).float()

    ours = [lane.logits(Part(ids[:40], 0, table))]
    ours += [lane.logits(Part(ids[i : i + 1], i, table)) for i in range(40, 60)]

    error = (torch.cat(ours).float() - expected).square().mean().sqrt()
    assert error < 1.3 * (theirs - expected).square().mean().sqrt()


def test_dynamic_rope_beyond_its_training_follows_the_longest_context(tmp_path: Path) -> None:
    """transformers rescales to the length at hand; keys of a cache are rotated once, for max_model_len."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = make_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=32)
    ids = some_token_ids(60, seed=4)
    lane = ThreadLane(folder, args={"max_model_len": 60})
    expected = reference_logits(folder, ids)

    assert_same_logits(lane.logits(Part(ids[:40], 0, list(range(15)))), expected[:40])
    assert_same_logits(lane.logits(Part(ids[40:], 40, list(range(15)))), expected[40:])
    with pytest.raises(ConfigError, match="max_model_len=65: must be within 1 and the model's longest context=64"):
        ThreadLane(folder, args={"max_model_len": 65})

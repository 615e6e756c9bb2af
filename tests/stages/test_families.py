"""Every family against transformers: float32 logits and greedy tokens, over layouts and ways of computing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_harness import (
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

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"family": "Mistral", "sliding_window": 9},
    "mistral-no-window": {"family": "Mistral", "sliding_window": None, "vocab_size": 101},
    "qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
    "qwen2-yarn": {"family": "Qwen2", "rope_parameters": YARN},
    "llama-yarn-attention-factor": {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}},
    "llama-yarn-mscale": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "llama-3-kv-heads": {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "vocab_size": 101,
    },
    "llama-1-kv-head": {"num_key_value_heads": 1, "vocab_size": 101},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), **FAMILIES[name])
        return made[name]

    return get


@pytest.mark.parametrize("tp, partition", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_agrees_with_transformers(
    checkpoint: Any, name: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    check_against_transformers(checkpoint(name), tp, partition)


@pytest.mark.parametrize("name, tp", [("mistral", 4), ("llama-1-kv-head", 4), ("llama-3-kv-heads", 3)])
def test_more_ranks_than_kv_heads_hold_copies(checkpoint: Any, name: str, tp: int) -> None:
    check_against_transformers(checkpoint(name), tp, None)


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

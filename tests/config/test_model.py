from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.model import ModelConfig, RopeConfig

WriteModel = Callable[..., Path]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def test_a_llama_folder_is_read(write_model: WriteModel) -> None:
    model = ModelConfig.from_folder(write_model())
    assert (model.architecture, model.num_layers, model.num_heads, model.num_kv_heads) == (
        "LlamaForCausalLM",
        8,
        8,
        4,
    )
    assert model.head_dim == 8
    assert model.torch_dtype == "bfloat16"
    assert model.rope == RopeConfig(theta=10000.0)
    assert not model.qk_norm


def test_what_config_json_leaves_out_has_the_defaults_of_transformers(write_model: WriteModel) -> None:
    model = ModelConfig.from_folder(
        write_model(without=("num_key_value_heads", "rope_theta", "torch_dtype", "eos_token_id"))
    )
    assert model.num_kv_heads == model.num_heads
    assert model.rope.theta == 10000.0
    assert model.torch_dtype == "float32"
    assert not model.tie_word_embeddings and not model.attention_bias and not model.mlp_bias
    assert model.eos_token_ids == ()
    assert model.bos_token_id is None


def test_qwen3_normalizes_queries_and_keys(write_model: WriteModel) -> None:
    model = ModelConfig.from_folder(write_model(architectures=["Qwen3ForCausalLM"], head_dim=32))
    assert model.qk_norm
    assert model.head_dim == 32


def test_eos_ids_come_from_both_files_each_once(write_model: WriteModel) -> None:
    folder = write_model(eos_token_id=[2, 7])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert ModelConfig.from_folder(folder).eos_token_ids == (7, 9, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["rope_scaling", "rope_scaling with its old key", "rope_parameters"],
)
def test_every_spelling_of_rope_scaling_means_the_same(write_model: WriteModel, changes: dict[str, Any]) -> None:
    assert ModelConfig.from_folder(write_model(**changes)).rope == RopeConfig(
        theta=5e5,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    )


def test_linear_rope_scaling_needs_its_factor(write_model: WriteModel) -> None:
    linear = ModelConfig.from_folder(write_model(rope_scaling={"rope_type": "linear", "factor": 2.0})).rope
    assert (linear.kind, linear.factor) == ("linear", 2.0)
    with pytest.raises(ConfigError, match="factor=None: is required by rope_type='linear'"):
        ModelConfig.from_folder(write_model(rope_scaling={"rope_type": "linear"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM, Qwen3ForCausalLM"),
        ({"hidden_size": "64"}, "hidden_size='64': must be an integer, at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=8"),
        ({"hidden_size": 60}, "hidden_size=60: must be a multiple of num_attention_heads=8"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'.*default, linear, llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be one of silu"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4}}, "quant_method=None: not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>': must be a token id"),
        ({"torch_dtype": "int8"}, "torch_dtype='int8': must be one of float32, bfloat16, float16"),
    ],
)
def test_what_would_change_answers_is_refused_by_name(
    write_model: WriteModel, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_folder(write_model(**changes))
    assert "config.json" in str(error.value)


def test_a_missing_key_is_named(write_model: WriteModel) -> None:
    with pytest.raises(ConfigError, match="vocab_size=None: is required and must be an integer"):
        ModelConfig.from_folder(write_model(without=("vocab_size",)))


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_config_json_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_without_config_json_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json is missing"):
        ModelConfig.from_folder(tmp_path)

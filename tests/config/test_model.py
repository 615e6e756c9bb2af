from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.model import ModelConfig, MoeConfig
from stagemesh.config.rope import RopeConfig

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
    assert not model.tie_word_embeddings and not model.qkv_bias and not model.mlp_bias
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


def test_yarn_is_read_with_the_defaults_of_transformers(write_model: WriteModel) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    model = ModelConfig.from_folder(write_model(max_position_embeddings=256, rope_scaling=yarn))
    assert (model.rope.beta_fast, model.rope.beta_slow, model.rope.truncate) == (32.0, 1.0, True)
    assert model.rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert model.longest_context == 512

    scaled = {**yarn, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope = ModelConfig.from_folder(write_model(rope_scaling=scaled)).rope
    assert rope.attention_factor == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert ModelConfig.from_folder(write_model(rope_scaling={**scaled, "attention_factor": 1.5})).rope == replace(
        rope, attention_factor=1.5
    )


def test_dynamic_rope_stretches_what_the_model_was_trained_for(write_model: WriteModel) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    model = ModelConfig.from_folder(write_model(max_position_embeddings=256, rope_scaling=dynamic))
    assert (model.rope.original_max_position_embeddings, model.longest_context) == (256, 512)


def test_mistral_has_its_window_and_qwen_one_that_is_switched_off(write_model: WriteModel) -> None:
    def window(architecture: str, **changes: Any) -> int | None:
        return ModelConfig.from_folder(write_model(architectures=[architecture], **changes)).sliding_window

    assert window("MistralForCausalLM", sliding_window=128) == 128
    assert window("MistralForCausalLM", sliding_window=None) is None
    assert window("MistralForCausalLM") == 4096  # what transformers takes it for
    assert window("Qwen2ForCausalLM", sliding_window=128, use_sliding_window=False) is None


def test_qwen2_has_a_bias_on_queries_keys_and_values_alone(write_model: WriteModel) -> None:
    model = ModelConfig.from_folder(write_model(architectures=["Qwen2ForCausalLM"]))
    assert (model.qkv_bias, model.output_bias) == (True, False)


QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def test_the_experts_of_every_family_are_read(write_model: WriteModel) -> None:
    def moe(architecture: str, **changes: Any) -> MoeConfig | None:
        return ModelConfig.from_folder(write_model(architectures=[architecture], **changes)).moe

    assert moe("LlamaForCausalLM") is None
    mixtral = moe("MixtralForCausalLM", num_local_experts=6, num_experts_per_tok=2)
    assert mixtral == MoeConfig(
        num_experts=6,
        top_k=2,
        intermediate_size=128,
        norm_topk_prob=True,
        shared_intermediate_size=0,
        layers=frozenset(range(8)),
    )
    every_other = moe("Qwen3MoeForCausalLM", **QWEN_MOE, decoder_sparse_step=2, mlp_only_layers=[3])
    assert every_other is not None and every_other.layers == {1, 5, 7}
    assert (every_other.norm_topk_prob, every_other.shared_intermediate_size) == (False, 0)
    shared = moe("Qwen2MoeForCausalLM", **QWEN_MOE, shared_expert_intermediate_size=48)
    assert shared is not None and shared.shared_intermediate_size == 48


DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": None,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
DEEPSEEK_V2 = {**DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": False}


def test_deepseek_is_read(write_model: WriteModel) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    model = ModelConfig.from_folder(write_model(**DEEPSEEK, rope_scaling=yarn))
    assert (model.num_kv_heads, model.head_dim, model.rotary_dim, model.kv_factor) == (1, 44, 4, 1)
    assert model.rope.attention_factor == 1.0
    assert model.mla is not None and model.mla.scale == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 4)
    assert model.moe == MoeConfig(
        num_experts=16,
        top_k=4,
        intermediate_size=32,
        norm_topk_prob=True,
        shared_intermediate_size=64,
        layers=frozenset(range(3, 8)),
        sigmoid=True,
        num_groups=4,
        top_groups=2,
        weight_scale=2.5,
        float32_router=True,
    )


def test_latent_attention_needs_no_head_dim_that_divides_the_hidden_size(write_model: WriteModel) -> None:
    assert ModelConfig.from_folder(write_model(**DEEPSEEK, hidden_size=60)).rotary_dim == 4
    assert ModelConfig.from_folder(write_model(**DEEPSEEK, head_dim=7)).rotary_dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**DEEPSEEK, "n_group": 3}, "n_group=3: must divide the 16 experts"),
        ({**DEEPSEEK, "n_group": 16}, "n_group=16: leaves one expert in a group"),
        ({**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank=None: is required by DeepseekV3ForCausalLM"),
        ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({**DEEPSEEK, "qk_rope_head_dim": 5}, "qk_rope_head_dim=5: must be even"),
        (
            {**DEEPSEEK_V2, "topk_method": "noaux_tc"},
            "topk_method='noaux_tc': not supported with DeepseekV2ForCausalLM",
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], **QWEN_MOE, "num_experts_per_tok": 7},
            "num_experts_per_tok=7: must be at most the 6 experts",
        ),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], **QWEN_MOE},
            "shared_expert_intermediate_size=None: is required by Qwen2MoeForCausalLM",
        ),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts=None: is required by MixtralForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2"),
        ({"hidden_size": "64"}, "hidden_size='64': must be an integer, at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=8"),
        ({"hidden_size": 60}, "hidden_size=60: must be a multiple of num_attention_heads=8"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'.*default, linear, dynamic, llama3, yarn"),
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


def test_keys_of_config_json_may_be_overridden(write_model: Callable[..., Path]) -> None:
    folder = write_model()
    model = ModelConfig.from_folder(folder, {"max_position_embeddings": 64, "eos_token_id": [5]})
    assert (model.max_position_embeddings, model.eos_token_ids) == (64, (5,))
    with pytest.raises(ConfigError, match="hf_overrides='rope_tetha': is no key .* did you mean 'rope_theta'"):
        ModelConfig.from_folder(folder, {"rope_tetha": 1.0})

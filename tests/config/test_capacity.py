from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stagemesh.config.capacity import capacity_line, kv_bytes_per_token, kv_tokens, weight_bytes
from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan


def llama_70b(write_model: Callable[..., Path]) -> ModelConfig:
    return ModelConfig.from_folder(
        write_model(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        )
    )


def test_kv_of_a_70b_model_is_320_kib_per_token(write_model: Callable[..., Path]) -> None:
    model = llama_70b(write_model)
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 1, 1), 0, 2) == 320 * 1024
    # Each rank holds 1/TP, each stage its own layers; beyond 8 ranks a whole head all the same.
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 4, 2), 1, 2) == 40 * 1024
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 16, 1), 0, 2) == 40 * 1024


def test_weights_of_a_70b_model_are_141_gb_however_it_is_cut(write_model: Callable[..., Path]) -> None:
    model = llama_70b(write_model)
    whole = weight_bytes(model, ParallelPlan.resolve(model, 1, 1), 0, 2)
    assert whole == 2 * 70_553_706_496
    plan = ParallelPlan.resolve(model, 8, 4)
    ranks = sum(8 * weight_bytes(model, plan, stage, 2) for stage in range(4))
    norms = 2 * 7 * 8192 * (2 * 80 + 1)  # the norms are on every rank
    assert ranks - whole == norms


def test_tied_embeddings_are_held_once_where_one_stage_has_both_ends(
    write_model: Callable[..., Path],
) -> None:
    model = ModelConfig.from_folder(write_model(tie_word_embeddings=True))
    untied = ModelConfig.from_folder(write_model())
    table = 100 * 64 * 2
    one, two = ParallelPlan.resolve(model, 1, 1), ParallelPlan.resolve(model, 1, 2)
    assert weight_bytes(untied, one, 0, 2) - weight_bytes(model, one, 0, 2) == table
    assert weight_bytes(untied, two, 1, 2) == weight_bytes(model, two, 1, 2)


def test_weights_of_mixtral_8x7b_are_93_gb_however_it_is_cut(write_model: Callable[..., Path]) -> None:
    model = ModelConfig.from_folder(
        write_model(
            architectures=["MixtralForCausalLM"],
            num_local_experts=8,
            num_experts_per_tok=2,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
        )
    )
    whole = weight_bytes(model, ParallelPlan.resolve(model, 1, 1), 0, 2)
    assert whole == 2 * 46_702_792_704
    for expert_parallel in (False, True):
        plan = ParallelPlan.resolve(model, 4, 1, expert_parallel=expert_parallel)
        on_every_rank = 2 * 3 * 4096 * (2 * 32 + 1 + 8 * 32)  # norms and routers
        assert 4 * weight_bytes(model, plan, 0, 2) - whole == on_every_rank


def test_deepseek_v3_has_671_billion_weights_and_a_short_cache(write_model: Callable[..., Path]) -> None:
    model = ModelConfig.from_folder(
        write_model(
            architectures=["DeepseekV3ForCausalLM"],
            hidden_size=7168,
            intermediate_size=18432,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            vocab_size=129280,
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_shared_experts=1,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        )
    )
    one = ParallelPlan.resolve(model, 1, 1)
    assert weight_bytes(model, one, 0, 1) == 671_026_419_200
    assert kv_bytes_per_token(model, one, 0, 2) == 61 * 576 * 2
    # The latents are on every rank.
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 8, 1), 0, 2) == 61 * 576 * 2


def test_a_lane_holds_whole_blocks_of_its_widest_stage(model_folder: Path) -> None:
    model = ModelConfig.from_folder(model_folder)
    plan = ParallelPlan.resolve(model, 1, 3)  # 3, 3 and 2 layers
    per_block = 16 * 2 * 3 * 4 * 8 * 4
    assert kv_tokens(model, plan, 4, 10 * per_block, 16) == 160
    assert kv_tokens(model, plan, 4, 10 * per_block - 1, 16) == 144


def test_the_capacity_line_reads_as_vllms() -> None:
    expected = "KV cache size: 643,232 tokens, Maximum concurrency for 40,960 tokens per request: 15.70x"
    assert capacity_line("cuda", 643232, 40960) == "GPU " + expected
    assert capacity_line("cpu", 643232, 40960) == "CPU " + expected

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stagemesh.config.capacity import capacity_line, kv_bytes_per_token, kv_tokens
from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan


def test_kv_of_a_70b_model_is_320_kib_per_token(write_model: Callable[..., Path]) -> None:
    model = ModelConfig.from_folder(
        write_model(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    )
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 1, 1), 0, 2) == 320 * 1024
    # Each rank holds 1/TP, each stage its own layers; beyond 8 ranks a whole head all the same.
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 4, 2), 1, 2) == 40 * 1024
    assert kv_bytes_per_token(model, ParallelPlan.resolve(model, 16, 1), 0, 2) == 40 * 1024


def test_the_cache_of_deepseek_v3_is_short_and_whole_on_every_rank(write_model: Callable[..., Path]) -> None:
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
    assert kv_bytes_per_token(model, one, 0, 2) == 61 * 576 * 2
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

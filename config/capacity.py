"""Memory arithmetic: what a layout needs, and how many tokens fit. Bytes are per rank."""

from __future__ import annotations

from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def kv_bytes_per_token(model: ModelConfig, plan: ParallelPlan, stage: int, dtype_bytes: int) -> int:
    """Keys and values of one token on each rank of `stage`."""
    return model.kv_sides * plan.num_layers(stage) * plan.kv_heads_per_rank * model.head_dim * dtype_bytes


def kv_tokens(model: ModelConfig, plan: ParallelPlan, dtype_bytes: int, memory_bytes: int, block_size: int) -> int:
    """Tokens that a lane's KV cache holds, in whole blocks: the stage with the most layers decides."""
    widest = max(kv_bytes_per_token(model, plan, stage, dtype_bytes) for stage in range(plan.pp_size))
    return memory_bytes // (widest * block_size) * block_size


def weight_bytes(model: ModelConfig, plan: ParallelPlan, stage: int, dtype_bytes: int) -> int:
    """Weights on each rank of `stage`; where ranks hold unequally many experts, on the one with the most."""
    tp, hidden = plan.tp_size, model.hidden_size
    layers = plan.num_layers(stage) * _attention_weights(model, plan)
    inner = model.intermediate_size // tp
    mlp = 3 * hidden * inner + (2 * inner + hidden if model.mlp_bias else 0)  # gate, up, down
    num_layers, num_mixtures = plan.num_layers(stage), 0
    mixture = 0
    if (moe := model.moe) is not None:
        num_mixtures = len(moe.layers.intersection(range(*plan.layer_ranges[stage])))
        if plan.expert_parallel:
            experts = -(-moe.num_experts // tp) * moe.intermediate_size
        else:
            experts = moe.num_experts * moe.intermediate_size // tp
        shared = moe.shared_intermediate_size
        mixture = 3 * hidden * (experts + shared // tp)  # and the routers:
        mixture += hidden * (moe.num_experts + moe.shared_gate) + (moe.num_experts if moe.sigmoid else 0)
    layers += (num_layers - num_mixtures) * mlp + num_mixtures * mixture
    vocab = -(-model.vocab_size // tp) * hidden  # rounded up: the vocabulary is padded to the ranks
    is_first, is_last = stage == 0, stage == plan.pp_size - 1
    tables = vocab * (is_first + is_last)
    if is_first and is_last and model.tie_word_embeddings:
        tables = vocab
    return (layers + tables + hidden * is_last) * dtype_bytes


def _attention_weights(model: ModelConfig, plan: ParallelPlan) -> int:
    """Numbers, not bytes, in the attention and the two norms of one layer."""
    hidden, heads = model.hidden_size, model.num_heads // plan.tp_size
    if (mla := model.mla) is not None:
        query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        rank = mla.q_lora_rank
        return (
            (hidden * query if rank is None else hidden * rank + rank + rank * query)
            + hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            + mla.kv_lora_rank
            + heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
            + heads * mla.v_head_dim * hidden
            + 2 * hidden
        )
    query = heads * model.head_dim
    kv = plan.kv_heads_per_rank * model.head_dim
    return (
        hidden * (query + 2 * kv)  # q, k, v
        + query * hidden  # o
        + 2 * hidden  # the two norms
        + (2 * model.head_dim if model.qk_norm else 0)
        + (query + 2 * kv if model.qkv_bias else 0)
        + (hidden if model.output_bias else 0)
    )


def capacity_line(device: str, num_tokens: int, max_model_len: int) -> str:
    """What a lane logs at start-up, in vLLM's words. `device`: "cuda" or "cpu"."""
    name = "CPU" if device == "cpu" else "GPU"
    return (
        f"{name} KV cache size: {num_tokens:,} tokens, Maximum concurrency for "
        f"{max_model_len:,} tokens per request: {num_tokens / max_model_len:.2f}x"
    )

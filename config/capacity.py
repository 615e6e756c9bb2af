"""Memory arithmetic. Bytes are per rank."""

from __future__ import annotations

from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def kv_bytes_per_token(model: ModelConfig, plan: ParallelPlan, stage: int, dtype_bytes: int) -> int:
    """Keys and values of one token on each rank of `stage`."""
    return model.kv_factor * plan.num_layers(stage) * plan.kv_heads_per_rank * model.head_dim * dtype_bytes


def kv_tokens(model: ModelConfig, plan: ParallelPlan, dtype_bytes: int, memory_bytes: int, block_size: int) -> int:
    """Tokens of a lane's KV cache, in whole blocks: the stage with the most layers decides."""
    stages = range(plan.pp_size)
    return min(stage_kv_tokens(model, plan, stage, dtype_bytes, memory_bytes, block_size) for stage in stages)


def stage_kv_tokens(
    model: ModelConfig, plan: ParallelPlan, stage: int, dtype_bytes: int, memory_bytes: int, block_size: int
) -> int:
    """Tokens that fit into `memory_bytes` of each rank of `stage`, in whole blocks."""
    return memory_bytes // (kv_bytes_per_token(model, plan, stage, dtype_bytes) * block_size) * block_size


def gpu_kv_budget(total_bytes: int, utilization: float, used_bytes: int, activation_bytes: int) -> int:
    """What `gpu_memory_utilization` leaves for KV beside the memory in use, weights included, and the largest step."""
    return int(total_bytes * utilization) - used_bytes - activation_bytes


def capacity_line(device: str, num_tokens: int, max_model_len: int) -> str:
    """The log line of a lane's start-up, in vLLM's words."""
    name = "CPU" if device == "cpu" else "GPU"
    return (
        f"{name} KV cache size: {num_tokens:,} tokens, Maximum concurrency for "
        f"{max_model_len:,} tokens per request: {num_tokens / max_model_len:.2f}x"
    )

"""Which families run in which formats, cut along which axes. The tests go through it, the README shows it."""

from __future__ import annotations

from typing import Any

MIXTURE = {"num_experts_per_tok": 2}
QWEN_MOE = MIXTURE | {"num_experts": 4, "moe_intermediate_size": 32}
DEEPSEEK = {
    "num_key_value_heads": 8,
    "head_dim": 8,  # what transformers takes for qk_rope_head_dim
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3.x": ("Llama", {}),
    "Mistral": ("Mistral", {"sliding_window": 6}),
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mixtral": ("Mixtral", MIXTURE | {"num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]}),
    "Qwen3-MoE": ("Qwen3Moe", QWEN_MOE),
    "DeepSeek-V2": ("DeepseekV2", DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "DeepSeek-V3": ("DeepseekV3", DEEPSEEK | {"norm_topk_prob": True, "num_mtp_layers": 0}),
}
"""What transformers calls a family, and what make_checkpoint is asked for, by its name in the README."""

FORMATS = {
    "FP8": ("fp8-tensor", "fp8-channel"),
    "FP8 128×128": ("fp8-block",),
    "INT8": ("int8-channel",),
    "AWQ": ("awq",),
    "GPTQ": ("gptq", "gptq-act-order"),
    "online FP8, INT8": ("online-fp8", "online-int8"),
}
"""The checkpoints that stand for a column of the README."""


def has_experts(family: str) -> bool:
    return "num_experts_per_tok" in FAMILIES[family][1]


def readme_table() -> str:
    """Every family in every format, in float32 and bfloat16, cut along every axis; only mixtures have experts."""
    columns = ["family", "TP", "PP", "EP", "float32", "bfloat16", *FORMATS]
    rows = [[name, "✓", "✓", "✓" if has_experts(name) else "–", *"✓✓", *("✓" for _ in FORMATS)] for name in FAMILIES]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)) + "\n"

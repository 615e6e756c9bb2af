"""A model folder that is all header: enough for everything that is decided before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def write_model_folder(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write `folder`. Keyword arguments change config.json, `without` removes keys from it."""
    config = {key: value for key, value in (LLAMA | changes).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes("model.norm.weight"))
    return folder


def safetensors_bytes(*tensors: str) -> bytes:
    """A valid safetensors file of tensors with four bytes each."""
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(tensors)
    }
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(4 * len(tensors))

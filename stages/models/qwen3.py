"""Qwen3: Llama's layer with a norm on every query and key head."""

from __future__ import annotations

from stagemesh.stages.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    qk_norm = True

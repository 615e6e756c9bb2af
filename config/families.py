"""Which family serves an architecture; named, not imported, because config/ does not depend on stages/."""

from __future__ import annotations

FAMILIES = {
    "LlamaForCausalLM": "stagemesh.stages.models.llama:Llama",
    "MistralForCausalLM": "stagemesh.stages.models.mistral:Mistral",
    "Qwen2ForCausalLM": "stagemesh.stages.models.qwen:Qwen2",
    "Qwen3ForCausalLM": "stagemesh.stages.models.qwen:Qwen3",
    "MixtralForCausalLM": "stagemesh.stages.models.mistral:Mixtral",
    "Qwen2MoeForCausalLM": "stagemesh.stages.models.qwen:Qwen2Moe",
    "Qwen3MoeForCausalLM": "stagemesh.stages.models.qwen:Qwen3Moe",
    "DeepseekV2ForCausalLM": "stagemesh.stages.models.deepseek:DeepseekV2",
    "DeepseekV3ForCausalLM": "stagemesh.stages.models.deepseek:DeepseekV3",
}
"""Entry of `architectures` → module and class, a `Family`."""

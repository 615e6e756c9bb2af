"""Which class serves which architecture. A new family is one file beside this one and one line here."""

from __future__ import annotations

from stagemesh.config.errors import ConfigError
from stagemesh.stages.models.decoder import CausalLM
from stagemesh.stages.models.deepseek import DeepseekForCausalLM
from stagemesh.stages.models.llama import LlamaForCausalLM
from stagemesh.stages.models.mixture import MixtralForCausalLM, QwenMoeForCausalLM

MODELS: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2MoeForCausalLM": QwenMoeForCausalLM,
    "Qwen3MoeForCausalLM": QwenMoeForCausalLM,
    "DeepseekV2ForCausalLM": DeepseekForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekForCausalLM,
}


def model_class(architecture: str) -> type[CausalLM]:
    """The model class of an `architectures` entry of a config.json; ConfigError names the known ones."""
    if architecture not in MODELS:
        raise ConfigError("architectures", architecture, f"is not among {', '.join(MODELS)}")
    return MODELS[architecture]

"""stagemesh: large language models served over many GPUs and machines, on Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagemesh.config.engine import EngineArgs as EngineArgs
    from stagemesh.config.pooling import PoolingParams as PoolingParams
    from stagemesh.config.sampling import SamplingParams as SamplingParams
    from stagemesh.config.sampling import StructuredOutputsParams as StructuredOutputsParams
    from stagemesh.config.vllm_params import RequestOutputKind as RequestOutputKind
    from stagemesh.deployments.offline.beam_search import BeamSearchParams as BeamSearchParams
    from stagemesh.deployments.offline.llm import LLM as LLM
    from stagemesh.deployments.offline.outputs import CompletionOutput as CompletionOutput
    from stagemesh.deployments.offline.outputs import EmbeddingOutput as EmbeddingOutput
    from stagemesh.deployments.offline.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from stagemesh.deployments.offline.outputs import PoolingOutput as PoolingOutput
    from stagemesh.deployments.offline.outputs import PoolingRequestOutput as PoolingRequestOutput
    from stagemesh.deployments.offline.outputs import RequestOutput as RequestOutput
    from stagemesh.deployments.offline.outputs import ScoringOutput as ScoringOutput
    from stagemesh.deployments.offline.outputs import ScoringRequestOutput as ScoringRequestOutput
    from stagemesh.deployments.offline.prompts import PromptType as PromptType
    from stagemesh.deployments.offline.prompts import TextPrompt as TextPrompt
    from stagemesh.deployments.offline.prompts import TokensPrompt as TokensPrompt

__version__ = "0.1.0"

_MODULES = {
    "config.engine": ["EngineArgs"],
    "config.pooling": ["PoolingParams"],
    "config.sampling": ["SamplingParams", "StructuredOutputsParams"],
    "config.vllm_params": ["RequestOutputKind"],
    "deployments.offline.beam_search": ["BeamSearchParams"],
    "deployments.offline.llm": ["LLM"],
    "deployments.offline.outputs": [
        "CompletionOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "PoolingOutput",
        "PoolingRequestOutput",
        "RequestOutput",
        "ScoringOutput",
        "ScoringRequestOutput",
    ],
    "deployments.offline.prompts": ["PromptType", "TextPrompt", "TokensPrompt"],
}
_HOMES = {name: f"stagemesh.{module}" for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public classes are imported on first use: every process imports this file, few of them need those."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stagemesh' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

"""stagemesh: large language models served over many GPUs and machines, on Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagemesh.config.pooling import PoolingParams as PoolingParams
    from stagemesh.config.sampling import SamplingParams as SamplingParams
    from stagemesh.deployments.offline.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "PoolingParams", "SamplingParams"]

_HOMES = {
    "LLM": "stagemesh.deployments.offline.llm",
    "PoolingParams": "stagemesh.config.pooling",
    "SamplingParams": "stagemesh.config.sampling",
}


def __getattr__(name: str) -> Any:
    """Public classes are imported on first use: every process imports this file, few of them need those."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stagemesh' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

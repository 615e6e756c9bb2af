"""A model's own sampling defaults, from its generation_config.json."""

from __future__ import annotations

import json
import logging
from typing import Any

import pydantic

from stagemesh.config.base import Settings
from stagemesh.config.engine import EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams

logger = logging.getLogger(__name__)


class _GenerationJson(Settings):
    """The keys that vLLM reads; it ignores `do_sample` too."""

    model_config = pydantic.ConfigDict(extra="ignore")

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def default_sampling(config: EngineConfig) -> dict[str, Any]:
    """The fields of SamplingParams that the file sets; none with "vllm". ConfigError names the key and the file."""
    path = config.local_model_path() / "generation_config.json"
    if config.generation_config == "vllm" or not path.exists():
        return {}
    try:
        defaults = _GenerationJson.parse(json.loads(path.read_text(encoding="utf-8"))).model_dump(exclude_none=True)
        if "max_new_tokens" in defaults:
            defaults["max_tokens"] = defaults.pop("max_new_tokens")
        SamplingParams(**defaults)
    except ConfigError as error:
        raise ConfigError(error.field, error.value, f"{error.reason} (in {path})") from None
    if defaults:
        logger.info("defaults of this model (generation_config='vllm' leaves them out): %s", defaults)
    return defaults

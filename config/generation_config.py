"""A model's own sampling defaults, from its generation_config.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pydantic

from stagemesh.config.base import Settings
from stagemesh.config.engine import EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import local_folder
from stagemesh.config.sampling import SamplingParams

logger = logging.getLogger(__name__)

FILE = "generation_config.json"


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
    """The fields of SamplingParams that the file sets, none with "vllm", and those of override_generation_config.

    ConfigError names the key and the file.
    """
    defaults: dict[str, Any] = {}
    if config.generation_config == "auto":
        defaults = _from_folder(config.local_model_path())
    elif config.generation_config != "vllm":
        folder = local_folder(config.generation_config)
        if folder is None or not (folder / FILE).is_file():
            reason = f"must be auto, vllm, or a folder with {FILE}"
            raise ConfigError("generation_config", config.generation_config, reason)
        defaults = _from_folder(folder)
    if config.override_generation_config:
        defaults |= _checked(config.override_generation_config, "override_generation_config")
    if defaults:
        logger.info("defaults of this model (generation_config='vllm' leaves its own out): %s", defaults)
    return defaults


def _from_folder(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    return _checked(json.loads(path.read_text(encoding="utf-8")), str(path)) if path.exists() else {}


def _checked(content: Any, source: str) -> dict[str, Any]:
    try:
        defaults = _GenerationJson.parse(content).model_dump(exclude_none=True)
        if "max_new_tokens" in defaults:
            defaults["max_tokens"] = defaults.pop("max_new_tokens")
        SamplingParams(**defaults)
    except ConfigError as error:
        raise ConfigError(error.field, error.value, f"{error.reason} (in {source})") from None
    return defaults

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.model_folder import write_model_folder

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.generation_config import default_sampling


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path)


def config(model: Path, given: Any = None, **args: Any) -> EngineConfig:
    if given is not None:
        (model / "generation_config.json").write_text(json.dumps(given))
    return EngineConfig.resolve(EngineArgs(model=str(model), device="cpu", max_model_len=64, **args))


def test_a_model_without_the_file_has_no_defaults(model: Path) -> None:
    assert default_sampling(config(model)) == {}


def test_what_the_file_says_about_sampling_is_taken_over_and_nothing_else(model: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05}
    more = {"max_new_tokens": 2048, "do_sample": True, "eos_token_id": [2], "num_beams": 4, "typical_p": None}
    assert default_sampling(config(model, given | more)) == given | {"max_tokens": 2048}


def test_do_sample_changes_nothing_as_in_vllm(model: Path) -> None:
    assert default_sampling(config(model, {"do_sample": False, "temperature": None})) == {}


def test_vllm_leaves_the_models_defaults_out(model: Path) -> None:
    assert default_sampling(config(model, {"temperature": 0.6}, generation_config="vllm")) == {}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 0}, "max_tokens=0"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_the_file(model: Path, given: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}.*generation_config.json"):
        default_sampling(config(model, given))


def test_another_folder_and_more_settings_on_top(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "top_k": 5}))
    args = {"generation_config": str(other), "override_generation_config": {"top_k": 7, "max_new_tokens": 9}}
    assert default_sampling(config(model, {"top_p": 0.5}, **args)) == {"temperature": 0.1, "top_k": 7, "max_tokens": 9}
    only = {"generation_config": "vllm", "override_generation_config": {"temperature": 0.5}}
    assert default_sampling(config(model, {"top_p": 0.5}, **only)) == {"temperature": 0.5}


def test_settings_that_cannot_be_are_named_with_their_source(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="top_p.*in override_generation_config"):
        default_sampling(config(model, override_generation_config={"top_p": 2.0}))
    with pytest.raises(ConfigError, match="generation_config='nowhere': must be auto, vllm, or a folder"):
        default_sampling(config(model, generation_config="nowhere"))

from __future__ import annotations

import pytest

from stagemesh.config.engine import EngineArgs
from stagemesh.config.errors import ConfigError
from stagemesh.config.vllm_flags import INERT, UNSUPPORTED, inert_warning, split_inert


def test_a_flag_has_one_meaning() -> None:
    fields = EngineArgs.model_fields.keys()
    assert fields & INERT.keys() == fields & UNSUPPORTED.keys() == INERT.keys() & UNSUPPORTED.keys() == set()


def test_what_means_nothing_here_is_told_apart_with_the_reason() -> None:
    meant, inert = split_inert({"seed": 1, "enforce_eager": True, "swap_space": 4})
    assert meant == {"seed": 1}
    assert inert_warning(inert).startswith("without effect here: enforce_eager (kernels are chosen by device")
    assert "; swap_space (" in inert_warning(inert)


def test_what_would_change_the_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="enable_lora=True: is not supported: LoRA"):
        split_inert({"enable_lora": True})
    assert split_inert({"enable_lora": False, "speculative_config": None}) == ({}, {})

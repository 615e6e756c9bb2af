from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.model_folder import write_model_folder


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder; keyword arguments change its config.json."""
    return partial(write_model_folder, tmp_path)


@pytest.fixture
def model_folder(write_model: Callable[..., Path]) -> Path:
    return write_model()

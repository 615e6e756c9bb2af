from __future__ import annotations

from pathlib import Path

import pytest
from support.model_harness import make_checkpoint


@pytest.fixture(params=["replicated", "dispatched"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways of expert parallelism, for steps of any size."""
    monkeypatch.setattr("stagemesh.stages.layers.moe.should_dispatch", lambda *_: request.param == "dispatched")
    return str(request.param)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, not quantized."""
    return make_checkpoint(tmp_path_factory.mktemp("source"))

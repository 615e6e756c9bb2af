from __future__ import annotations

import pytest


@pytest.fixture(params=["replicated", "dispatched"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways of expert parallelism, for steps of any size."""
    monkeypatch.setattr("stagemesh.stages.layers.moe.dispatch_pays", lambda *_: request.param == "dispatched")
    return str(request.param)

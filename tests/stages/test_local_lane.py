"""A lane inside the process: what it frees when it cannot start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zmq
from model_harness import make_checkpoint

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.stages.local_lane import LocalLane
from stagemesh.stages.runner import ModelRunner


def test_a_lane_that_cannot_start_leaves_no_socket_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[zmq.Context[Any]] = []

    class Recorded(zmq.Context[Any]):
        def __init__(self) -> None:
            super().__init__()
            contexts.append(self)

    def no_room(runner: ModelRunner, num_blocks: int) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(zmq, "Context", Recorded)
    monkeypatch.setattr(ModelRunner, "allocate_kv", no_room)
    config = EngineConfig.resolve(EngineArgs(model=str(make_checkpoint(tmp_path)), device="cpu"))
    with pytest.raises(MemoryError):
        LocalLane(config, sink=None, on_failure=print)  # type: ignore[arg-type]  # it does not come that far
    assert contexts and all(context.closed for context in contexts)

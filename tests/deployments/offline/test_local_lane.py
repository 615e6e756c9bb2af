"""A lane inside the process: what it frees when it cannot start, and the expert load that it reports."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import zmq
from support.model_harness import Part, ThreadLane, make_checkpoint, some_token_ids

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.offline.local_lane import LocalLane
from stagemesh.stages.messages.request import EngineRequest, LaneStats, TokenDelta
from stagemesh.stages.worker.model_runner import ModelRunner


class Sink:
    def __init__(self) -> None:
        self.token_ids: dict[str, list[int]] = {}

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        for delta in deltas:
            self.token_ids.setdefault(delta.request_id, []).extend(delta.token_ids)
        return True

    def publish(self, stats: LaneStats) -> None:
        pass


def resolve(folder: Path) -> EngineConfig:
    return EngineConfig.resolve(EngineArgs(model=str(folder), device="cpu", dtype="float32", block_size=4))


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
    with pytest.raises(MemoryError):
        LocalLane(resolve(make_checkpoint(tmp_path)), Sink(), on_failure=print)
    assert contexts and all(context.closed for context in contexts)


def test_every_token_of_every_step_is_in_the_expert_load_of_the_lane(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "Mixtral", num_local_experts=5, num_experts_per_tok=2)
    prompts = {f"r{n}": some_token_ids(n, seed=n) for n in (3, 8, 21)}
    sink, failures = Sink(), list[str]()
    lane = LocalLane(resolve(folder), sink, failures.append)
    try:
        # One after another, so that each last step is one token.
        for name, prompt in prompts.items():
            params = SamplingParams(max_tokens=6, temperature=0.0, seed=0, ignore_eos=True)
            lane.engine.generate(EngineRequest(name, prompt, params, "router")).result(30)
        # The last token of an answer is not computed.
        computed = [prompt + sink.token_ids[name][:-1] for name, prompt in prompts.items()]
        expected = expert_tokens(folder, computed)
        assert sum(expected) == sum(map(len, computed)) * 2 * 3  # top_k, layers
        deadline = time.monotonic() + 10
        while sum((stats := lane.engine.stats().result(5)).expert_tokens) < sum(expected):
            assert time.monotonic() < deadline and not failures
            time.sleep(0.05)
        assert stats.expert_tokens == expected
        assert stats.expert_imbalance == pytest.approx(5 / 2), "a single token has 2 busy experts of 5 in each layer"
    finally:
        lane.close()


def expert_tokens(folder: Path, sequences: list[list[int]]) -> list[int]:
    """By number of the expert, each sequence in one step."""
    lane = ThreadLane(folder)
    totals = [0] * 5
    for token_ids in sequences:
        lane.logits(Part(token_ids, 0, list(range(10))))
        for load in lane.stages[0][0].expert_load().values():
            totals = [a + b for a, b in zip(totals, load, strict=True)]
    return totals

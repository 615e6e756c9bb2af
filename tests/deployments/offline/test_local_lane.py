"""A lane inside the process: what `stages/engine/lane.py` promises, and the expert load that it reports."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import zmq
from support.model_harness import Part, ThreadLane, make_checkpoint, some_token_ids

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.offline.local_lane import LocalLane
from stagemesh.stages.messages.request import EngineRequest, LaneStats, RequestSummary, TokenDelta
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

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        return set()


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
    lane = LocalLane(resolve(make_checkpoint(tmp_path)), Sink(), on_failure=print)
    with pytest.raises(MemoryError):
        lane.start()
    assert contexts and all(context.closed for context in contexts)
    lane.close()


def test_a_lane_may_be_closed_before_it_started(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    lane = LocalLane(resolve(make_checkpoint(tmp_path)), Sink(), on_failure=print)
    lane.close()
    lane.close()
    assert set(threading.enumerate()) <= threads


def test_a_lane_keeps_its_promises(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    sink, failures = Sink(), list[str]()
    lane = LocalLane(resolve(make_checkpoint(tmp_path)), sink, failures.append)
    lane.start()

    def generate(name: str, max_tokens: int) -> Future[RequestSummary]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, ignore_eos=True)
        return lane.generate(EngineRequest(name, some_token_ids(5, seed=1), params, "router"))

    together = {name: generate(name, 6) for name in ("a", "b", "c")}
    for name, future in together.items():
        assert future.result(30).num_tokens == 6
        assert len(sink.token_ids[name]) == 6, "the sink had them before the future ended"
    with pytest.raises(ConfigError, match="max_model_len"):
        lane.generate(EngineRequest("too long", [5] * 10_000, SamplingParams(), "router")).result(30)
    lane.abort("never heard of").result(30)
    lane.abort("a").result(30)
    endless = generate("endless", 1000)
    lane.abort("endless").result(30)
    assert endless.result(30).finish_reason == "abort"
    cut_off = generate("cut off", 1000)
    lane.close()
    lane.close()
    for future in (cut_off, generate("late", 1)):
        with pytest.raises(RuntimeError, match="shut down"):
            future.result(30)
    assert set(threading.enumerate()) <= threads and not failures


def test_every_token_of_every_step_is_in_the_expert_load_of_the_lane(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "Mixtral", num_local_experts=5, num_experts_per_tok=2)
    prompts = {f"r{n}": some_token_ids(n, seed=n) for n in (3, 8, 21)}
    sink, failures = Sink(), list[str]()
    lane = LocalLane(resolve(folder), sink, failures.append)
    lane.start()
    try:
        alive = [[0]]  # the token by which the lane shows that it is
        # One after another, so that each last step is one token.
        for name, prompt in prompts.items():
            params = SamplingParams(max_tokens=6, temperature=0.0, seed=0, ignore_eos=True)
            lane.generate(EngineRequest(name, prompt, params, "router")).result(30)
        # The last token of an answer is not computed.
        computed = [prompt + sink.token_ids[name][:-1] for name, prompt in prompts.items()]
        expected = expert_tokens(folder, computed + alive)
        assert sum(expected) == sum(map(len, computed + alive)) * 2 * 3  # top_k, layers
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

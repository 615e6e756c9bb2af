"""One worker on its own: plans and tokens come from the test, by the sockets that a lane uses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import chain
from pathlib import Path

import msgspec
import pytest
import zmq
from support.model_harness import Part, make_plan, some_token_ids

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.stages.messages.step import (
    SampledTokens,
    StepPlan,
    StepResult,
    StopRun,
    ToWorker,
    WorkerMessage,
    WorkerStats,
)
from stagemesh.stages.messages.wiring import Wiring
from stagemesh.stages.worker.worker import Worker

HOST = "127.0.0.1"
EPOCH = 1


class Bench:
    """A worker in its run loop."""

    def __init__(self, folder: Path) -> None:
        args = {"model": str(folder), "device": "cpu", "dtype": "float32", "block_size": 4, "step_timeout_s": 1.0}
        self.worker = Worker(EngineConfig.resolve(EngineArgs.parse(args)), 0, 0, HOST)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.worker.load()
        endpoints = self.worker.open(EPOCH)
        self.plans = self.context.socket(zmq.PUSH)
        self.plans.connect(endpoints.plan_address)
        self.results = self.context.socket(zmq.PULL)
        port = self.results.bind_to_random_port(f"tcp://{HOST}")
        self.worker.connect(
            Wiring(EPOCH, HOST, 0, f"tcp://{HOST}:{port}", sampled_tokens_to=(endpoints.plan_address,), num_blocks=16)
        )
        self.ended: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.ended.set_result(self.worker.run())
        except BaseException as error:
            self.ended.set_exception(error)

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self.plans.send(msgspec.msgpack.encode(message))

    def receive(self) -> WorkerMessage:
        assert self.results.poll(10_000), "nothing within 10 s"
        return msgspec.msgpack.decode(self.results.recv(), type=WorkerMessage)

    def result(self) -> StepResult:
        while not isinstance(message := self.receive(), StepResult):
            pass
        return message

    def until(self, phase: str) -> None:
        deadline = time.monotonic() + 10
        while self.worker.progress().phase != phase:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def bench(source: Path) -> Iterator[Bench]:
    bench = Bench(source)
    yield bench
    bench.worker.stop(EPOCH)
    bench.thread.join(10)
    assert not bench.thread.is_alive()
    bench.worker.close()
    bench.context.destroy(linger=0)


PROMPTS = [some_token_ids(5, seed=1), some_token_ids(3, seed=2)]
TABLES = [[3, 1], [0, 7]]


def prefill() -> StepPlan:
    return make_plan(*(Part(ids, 0, table) for ids, table in zip(PROMPTS, TABLES, strict=True)), step=0)


def decode(*token_ids: int, step: int = 1, placeholder_step: int = -1) -> StepPlan:
    parts = [Part([token], len(ids), table) for token, ids, table in zip(token_ids, PROMPTS, TABLES, strict=True)]
    return msgspec.structs.replace(make_plan(*parts, step=step), placeholder_step=placeholder_step)


def test_a_plan_with_placeholders_computes_what_a_plan_with_the_tokens_does(bench: Bench) -> None:
    bench.send(prefill())
    first = bench.result().token_ids
    bench.send(decode(*first))
    second = bench.result().token_ids
    bench.send(prefill(), decode(-1, -2, placeholder_step=0))
    assert (bench.result().token_ids, bench.result().token_ids) == (first, second)
    bench.send(prefill(), decode(-2, first[1], placeholder_step=0), decode(first[1], first[1], step=2))
    assert bench.result().token_ids == first
    assert bench.result().token_ids == bench.result().token_ids, "any row may be meant, and known tokens stand beside"


@pytest.mark.parametrize("early", [True, False])
def test_tokens_that_another_rank_samples_are_taken_when_they_come(bench: Bench, early: bool) -> None:
    tokens, later = SampledTokens(EPOCH, 6, [17, 23]), SampledTokens(EPOCH, 7, [3, 3])
    plan = decode(-2, -1, step=7, placeholder_step=6)
    bench.send(prefill(), decode(23, 17))
    expected = [bench.result(), bench.result()][1].token_ids
    if early:
        bench.send(tokens, later, plan)
    else:
        bench.send(plan, decode(23, 17, step=8))
        bench.until("tokens")
        bench.send(SampledTokens(EPOCH - 1, 6, [1, 1]), SampledTokens(EPOCH, 5, [2, 2]), tokens)
        assert bench.worker.progress().step == 7
    assert bench.result().token_ids == expected
    if not early:
        assert bench.result().step == 8, "a plan that came meanwhile is not lost"


def test_each_step_is_reported_once_with_its_time_inside_the_model(bench: Bench) -> None:
    before = time.time()
    spans: list[tuple[float, float]] = []
    for more, so_far in ((3, 3), (2, 5)):
        bench.send(*[prefill()] * more)
        while len(spans) < so_far:
            message = bench.receive()
            spans += message.spans if isinstance(message, WorkerStats) else []
        assert len(spans) == so_far
    times = [before, *chain.from_iterable(spans), time.time()]
    assert times == sorted(times)


def test_a_worker_that_waits_for_tokens_can_be_stopped(bench: Bench) -> None:
    bench.send(decode(-1, -2, step=7, placeholder_step=6))
    bench.until("tokens")
    bench.worker.stop(EPOCH)
    assert bench.ended.result(0.9) is None


def test_plans_that_came_before_the_end_are_run(bench: Bench) -> None:
    bench.send(prefill(), StopRun(EPOCH))
    assert len(bench.result().token_ids) == 2
    assert bench.ended.result(10) is None

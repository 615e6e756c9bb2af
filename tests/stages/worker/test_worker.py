"""One worker on its own: plans and tokens come from the test, by the sockets that a lane uses."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from support.model_harness import Part, make_plan, some_token_ids

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.stages.layers.tensor_parallel import PeerLost
from stagemesh.stages.messages.channel import LeaderChannel
from stagemesh.stages.messages.step import (
    SampledTokens,
    StepFailure,
    StepPlan,
    StepResult,
    StopRun,
    ToWorker,
    WorkerMessage,
    WorkerStats,
)
from stagemesh.stages.messages.wiring import Endpoints, Wiring, make_wiring
from stagemesh.stages.worker.worker import EpochStuck, Worker

HOST = "127.0.0.1"
EPOCH = 1


class Bench:
    """A worker in its run loop."""

    def __init__(self, folder: Path) -> None:
        args = {"model": str(folder), "device": "cpu", "dtype": "float32", "block_size": 4, "step_timeout_s": 1.0}
        self.worker = Worker(EngineConfig.resolve(EngineArgs.parse(args)), 0, 0, HOST)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.worker.load()
        self.results = self.context.socket(zmq.PULL)
        port = self.results.bind_to_random_port(f"tcp://{HOST}")
        self.sockets: list[zmq.Socket[bytes]] = []
        self.results_to = f"tcp://{HOST}:{port}"
        self.start(EPOCH)

    def start(self, epoch: int) -> None:
        endpoints = self.worker.open(epoch)
        self.plans = self.context.socket(zmq.PUSH)
        self.sockets.append(self.plans)  # what is left of an older epoch stays open
        self.plans.connect(endpoints.plan_address)
        self.wiring = Wiring(epoch, HOST, 0, self.results_to, (endpoints.plan_address,), num_blocks=16)
        self.worker.connect(self.wiring)
        self.ended: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, args=(epoch, self.ended), daemon=True)
        self.thread.start()
        self.until("idle")

    def _run(self, epoch: int, ended: Future[None]) -> None:
        try:
            ended.set_result(self.worker.run(epoch))
        except BaseException as error:
            ended.set_exception(error)

    def raise_in_model(self, error: Exception) -> None:
        def execute(*_: object) -> None:
            raise error

        self.worker._runner.execute = execute  # type: ignore[method-assign, assignment]

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
    bench.worker.stop()
    bench.thread.join(10)
    assert not bench.thread.is_alive()
    bench.worker.close()
    bench.context.destroy(linger=0)


PROMPTS = [some_token_ids(5, seed=1), some_token_ids(3, seed=2)]
TABLES = [[3, 1], [0, 7]]


def prefill(step: int = 0) -> StepPlan:
    return make_plan(*(Part(ids, 0, table) for ids, table in zip(PROMPTS, TABLES, strict=True)), step=step)


def decode(*token_ids: int, step: int, placeholder_step: int = -1) -> StepPlan:
    parts = [Part([token], len(ids), table) for token, ids, table in zip(token_ids, PROMPTS, TABLES, strict=True)]
    return msgspec.structs.replace(make_plan(*parts, step=step), placeholder_step=placeholder_step)


def test_a_plan_with_placeholders_computes_what_a_plan_with_the_tokens_does(bench: Bench) -> None:
    bench.send(prefill())
    first = bench.result().token_ids
    bench.send(decode(*first, step=1))
    second = bench.result().token_ids
    bench.send(prefill(2), decode(-1, -2, step=3, placeholder_step=2))
    assert (bench.result().token_ids, bench.result().token_ids) == (first, second)
    bench.send(prefill(4), decode(-2, first[1], step=5, placeholder_step=4), decode(first[1], first[1], step=6))
    assert bench.result().token_ids == first
    assert bench.result().token_ids == bench.result().token_ids, "any row may be meant, and known tokens stand beside"


@pytest.mark.parametrize("early", [True, False])
def test_tokens_that_another_rank_samples_are_taken_when_they_come(bench: Bench, early: bool) -> None:
    # Of steps that this worker has not run: else it would have their tokens itself.
    tokens, later = SampledTokens(EPOCH, 16, [17, 23]), SampledTokens(EPOCH, 17, [3, 3])
    plan = decode(-2, -1, step=2, placeholder_step=16)
    bench.send(prefill(), decode(23, 17, step=1))
    expected = [bench.result(), bench.result()][1].token_ids
    if early:
        bench.send(tokens, later, plan)
    else:
        bench.send(plan, decode(23, 17, step=3))
        bench.until("tokens")
        assert bench.worker.progress().step == 2
        bench.send(SampledTokens(EPOCH - 1, 16, [1, 1]), SampledTokens(EPOCH, 15, [2, 2]), tokens)
    assert bench.result().token_ids == expected
    if not early:
        assert bench.result().step == 3, "a plan that came meanwhile is not lost"


def test_each_step_is_reported_once_with_its_time_inside_the_model(bench: Bench) -> None:
    before = time.time()
    spans: list[tuple[float, float]] = []
    for steps in (range(3), range(3, 5)):
        bench.send(*map(prefill, steps))
        while len(spans) < steps.stop:
            message = bench.receive()
            spans += message.spans if isinstance(message, WorkerStats) else []
        assert len(spans) == steps.stop
    times = [before, *chain.from_iterable(spans), time.time()]
    assert times == sorted(times)


def test_a_worker_that_waits_for_tokens_can_be_stopped(bench: Bench) -> None:
    bench.send(decode(-1, -2, step=0, placeholder_step=6))
    bench.until("tokens")
    bench.worker.stop(EPOCH)
    assert bench.ended.result(0.9) is None


def test_plans_that_came_before_the_end_are_run(bench: Bench) -> None:
    bench.send(prefill(), StopRun(EPOCH))
    assert len(bench.result().token_ids) == 2
    assert bench.ended.result(10) is None


# -- epochs ----------------------------------------------------------------------------------------------


def test_a_new_epoch_waits_until_the_run_of_the_old_one_has_ended(bench: Bench) -> None:
    bench.send(decode(-1, -2, step=0, placeholder_step=6))
    bench.until("tokens")
    old_run, old_plans = bench.ended, bench.plans
    bench.start(EPOCH + 5)
    assert old_run.result(0) is None
    old_plans.send(msgspec.msgpack.encode(prefill()))
    bench.send(prefill(), msgspec.structs.replace(prefill(), epoch=EPOCH + 5))
    assert bench.result().epoch == EPOCH + 5
    bench.worker.stop(EPOCH)
    bench.send(msgspec.structs.replace(prefill(1), epoch=EPOCH + 5))
    assert (result := bench.result()).step == 1 and result.epoch == EPOCH + 5, "nothing old came through"


def test_of_two_epochs_that_wait_for_the_end_of_one_the_newer_stays(bench: Bench) -> None:
    entered, resume = threading.Event(), threading.Event()
    execute = bench.worker._runner.execute

    def slow_execute(*args: Any) -> torch.Tensor:
        entered.set()
        resume.wait(10)
        return execute(*args)

    bench.worker._runner.execute = slow_execute  # type: ignore[method-assign, assignment]
    bench.send(prefill())
    assert entered.wait(10)
    with ThreadPoolExecutor() as pool:
        newer, older = pool.submit(bench.start, EPOCH + 2), pool.submit(bench.worker.open, EPOCH + 1)
        time.sleep(0.1)
        resume.set()
        newer.result(10)
        assert older.exception(10) is None or "is refused" in str(older.exception())
    assert bench.result().epoch == EPOCH
    bench.send(msgspec.structs.replace(prefill(), epoch=EPOCH + 2))
    assert bench.result().epoch == EPOCH + 2


def test_an_epoch_that_does_not_end_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagemesh.stages.worker.worker.JOIN_TIMEOUT_S", 0.1)
    entered, resume = threading.Event(), threading.Event()

    def execute(*_: object) -> None:
        entered.set()
        resume.wait(10)
        raise ArithmeticError("too late")

    bench.worker._runner.execute = execute  # type: ignore[method-assign, assignment]
    bench.send(prefill())
    assert entered.wait(10)
    with pytest.raises(EpochStuck, match=f"epoch {EPOCH} was still in phase 'model' of step 0 0.1 s after it"):
        bench.worker.open(EPOCH + 1)
    resume.set()
    assert isinstance(bench.receive(), StepFailure), "its sockets were open"
    with pytest.raises(ArithmeticError):
        bench.ended.result(10)


def test_what_comes_out_of_order_or_from_an_older_epoch_is_refused(bench: Bench) -> None:
    other = replace(bench.wiring, epoch=EPOCH + 1)
    for refused, why in [
        (lambda: bench.worker.open(EPOCH), "epoch 1 is refused: this worker is already in epoch 1"),
        (lambda: bench.worker.open(EPOCH - 1), "epoch 0 is refused: this worker is already in epoch 1"),
        (lambda: bench.worker.connect(other), "epoch 2 is refused: this worker is in epoch 1"),
        (lambda: bench.worker.connect(bench.wiring), "epoch 1 is running, and not open"),
        (lambda: bench.worker.run(EPOCH + 1), "epoch 2 is refused: this worker is in epoch 1"),
        (lambda: bench.worker.run(EPOCH), "epoch 1 is running, and not connected"),
    ]:
        with pytest.raises(RuntimeError, match=why):
            refused()
    bench.send(prefill())
    assert bench.result().step == 0, "the run goes on"


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_that_is_not_due_ends_the_run(bench: Bench, step: int) -> None:
    bench.send(prefill(0), prefill(step))
    with pytest.raises(RuntimeError, match=f"step {step} came while step 1 was due"):
        bench.ended.result(10)


def test_a_worker_that_waits_for_a_rank_in_vain_can_be_stopped(source: Path) -> None:
    args = {"model": str(source), "device": "cpu", "dtype": "float32", "tensor_parallel_size": 2}
    config = EngineConfig.resolve(EngineArgs.parse(args))
    worker = Worker(config, 0, 0, HOST)
    endpoints = worker.open(EPOCH)
    wiring = make_wiring(
        EPOCH, {(0, 0): endpoints, (0, 1): Endpoints("tcp://127.0.0.1:1", None)}, "tcp://127.0.0.1:2", 4
    )
    with ThreadPoolExecutor() as pool:
        connecting = pool.submit(worker.connect, wiring)
        while worker.progress().phase != "rendezvous":
            time.sleep(0.001)
        worker.open(EPOCH + 1)
        with pytest.raises(RuntimeError, match="epoch 1 was stopped during its rendezvous"):
            connecting.result(10)
    worker.close()


# -- failures --------------------------------------------------------------------------------------------


def test_what_the_model_raises_is_sent_to_the_leader(bench: Bench) -> None:
    bench.send(prefill(), prefill(1))
    bench.result(), bench.result()
    bench.raise_in_model(ArithmeticError("the flux is out of range"))
    bench.send(prefill(2))
    while not isinstance(message := bench.receive(), StepFailure):
        pass
    assert message == StepFailure(EPOCH, 2, 0, 0, "ArithmeticError: the flux is out of range")
    with pytest.raises(ArithmeticError):
        bench.ended.result(10)


def test_a_lost_peer_is_no_failure_of_the_step(bench: Bench) -> None:
    bench.raise_in_model(PeerLost("Connection closed by peer"))
    bench.send(prefill())
    with pytest.raises(PeerLost):
        bench.ended.result(10)
    assert not bench.results.poll(200)


def test_of_two_ranks_only_the_one_that_raised_is_blamed(source: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    pipes = [processes.Pipe() for _ in range(2)]
    ranks = [processes.Process(target=run_rank, args=(source, r, pipes[r][1]), daemon=True) for r in range(2)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = LeaderChannel(context, HOST)
    try:
        for rank in ranks:
            rank.start()
        endpoints = {(0, r): pipes[r][0].recv() for r in range(2)}
        for pipe, _ in pipes:
            pipe.send(make_wiring(EPOCH, endpoints, channel.address, num_blocks=16))
        channel.connect([endpoints[rank].plan_address for rank in sorted(endpoints)])
        channel.send(prefill())
        assert [pipe.recv() for pipe, _ in pipes] == ["PeerLost", "ArithmeticError"]
        failures = []
        while channel.results.poll(500):
            failures += [message for message in channel.receive() if isinstance(message, StepFailure)]
        assert failures == [StepFailure(EPOCH, 0, 0, 1, "ArithmeticError: the flux is out of range")]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
        channel.close()
        context.destroy(linger=0)


def run_rank(folder: Path, tp_rank: int, pipe: Connection) -> None:
    """Sends its endpoints, then the type of what its run raises. The model of rank 1 raises."""
    torch.set_num_threads(1)
    args = {"model": str(folder), "device": "cpu", "dtype": "float32", "block_size": 4, "tensor_parallel_size": 2}
    worker = Worker(EngineConfig.resolve(EngineArgs.parse(args)), 0, tp_rank, HOST)
    worker.load()
    pipe.send(worker.open(EPOCH))
    worker.connect(pipe.recv())
    if tp_rank == 1:

        def execute(*_: object) -> None:
            raise ArithmeticError("the flux is out of range")

        worker._runner.execute = execute  # type: ignore[method-assign, assignment]
    try:
        worker.run(EPOCH)
    except Exception as error:
        worker.close()
        pipe.send(type(error).__name__)

"""The engine loop against a worker that is a few lines of Python: real sockets, real plans, no model."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from support.model_folder import write_model_folder

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams, StructuredOutputsParams
from stagemesh.stages.engine import engine as engine_module
from stagemesh.stages.engine.engine import Engine
from stagemesh.stages.engine.lane import StepTimeout
from stagemesh.stages.engine.step_timing import StepTimes
from stagemesh.stages.messages import channel as channel_module
from stagemesh.stages.messages.channel import LeaderChannel, RouterLinks, bind_random_port
from stagemesh.stages.messages.request import EngineRequest, LaneStats, TokenBatch, TokenDelta
from stagemesh.stages.messages.step import (
    LeaderMessage,
    StepFailure,
    StepPlan,
    StepResult,
    StopRun,
    TokenLogprobs,
    WorkerStats,
)

HOST = "127.0.0.1"


class FakeWorker:
    """Answers each plan with (last token of the sequence + 1) mod 90 + 5: greedy, and a function of the tokens."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], channel: LeaderChannel) -> None:
        self._plans = context.socket(zmq.PULL)
        self.address = bind_random_port(self._plans, HOST)
        self._results = context.socket(zmq.PUSH)
        self._results.connect(channel.address)
        self.stopped = threading.Event()
        self.mute = False
        self.bad_token: int | None = None
        """A step with it fails."""
        self.unsampled_token: int | None = None
        """After it no token can be sampled."""
        self.step_s = 0.0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        sampled: dict[int, list[int]] = {}
        decode = msgspec.msgpack.Decoder(LeaderMessage).decode
        encode = msgspec.msgpack.Encoder().encode
        while self._plans.poll(20_000):
            message = decode(self._plans.recv())
            if isinstance(message, StopRun):
                self.stopped.set()
                break
            if self.mute:
                continue
            if self.bad_token in array("i", message.token_ids):
                self.mute = True  # it leaves its run loop
                self._results.send(encode(StepFailure(message.epoch, message.step, 1, 0, "ValueError: bad")))
                continue
            now = time.time()
            time.sleep(self.step_s)
            answer = result(message, sampled.get(message.placeholder_step, []))
            if array("i", message.token_ids)[0] == self.unsampled_token:
                answer.token_ids[0] = -1
            sampled[message.step] = answer.token_ids
            self._results.send(encode(answer))
            self._results.send(encode(WorkerStats(message.epoch, 0, [(now, now + 0.001)])))
        self._plans.close(linger=0)
        self._results.close(linger=0)


def next_tokens(plan: StepPlan, sampled_token_ids: list[int]) -> list[int]:
    """sampled_token_ids: what step `plan.placeholder_step` sampled."""
    tokens = [token if token >= 0 else sampled_token_ids[-1 - token] for token in array("i", plan.token_ids)]
    lens = array("i", plan.query_lens)
    ends = [sum(lens[: i + 1]) for i in range(len(lens))]
    return [(tokens[end - 1] + 1) % 90 + 5 for end, spec in zip(ends, plan.samples, strict=True) if spec is not None]


def result(plan: StepPlan, sampled_token_ids: list[int]) -> StepResult:
    token_ids = next_tokens(plan, sampled_token_ids)
    specs = [spec for spec in plan.samples if spec is not None]
    asked = [spec.num_logprobs is not None for spec in specs]
    reports = [report(token_id) if ask else None for token_id, ask in zip(token_ids, asked, strict=True)]
    prompts = [[report(token_id) for token_id in array("i", spec.target_ids)] for spec in plan.prompt_logprobs]
    return StepResult(plan.epoch, plan.step, token_ids, reports if any(asked) else [], prompts)


def report(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.5, 2, [7], [-0.5])


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = [prompt[-1]]
    for _ in range(count):
        tokens.append((tokens[-1] + 1) % 90 + 5)
    return tokens[1:]


class Sink:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.lane_stats: list[LaneStats] = []
        self.gone: set[str] = set()
        """Their queue is full."""
        self.dead: set[str] = set()

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        if reply_to in self.gone:
            return False
        self.deltas += deltas
        return True

    def publish(self, stats: LaneStats) -> None:
        self.lane_stats.append(stats)

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        return self.dead.intersection(reply_to)

    def last(self, request_id: str) -> TokenDelta:
        return [delta for delta in self.deltas if delta.request_id == request_id][-1]

    def tokens(self, request_id: str) -> list[int]:
        """In order, with the offsets checked as a router does."""
        tokens: list[int] = []
        for delta in self.deltas:
            if delta.request_id == request_id:
                assert delta.offset == len(tokens)
                tokens += delta.token_ids
        return tokens


class Bench:
    """An engine, and workers to wire it with."""

    def __init__(self, folder: Path, **more: Any) -> None:
        args = {"model": str(folder), "device": "cpu", "step_timeout_s": 0.5, "max_num_seqs": 8, **more}
        self.config = EngineConfig.resolve(EngineArgs.parse(args))
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sink = Sink()
        self.failures: list[tuple[int, Exception]] = []
        self.failed = threading.Event()
        self.workers: list[FakeWorker] = []
        self.engine = Engine(self.config, "lane", self.sink, self._on_failure)

    def _on_failure(self, epoch: int, error: Exception) -> None:
        self.failures.append((epoch, error))
        self.failed.set()

    def wire(self, epoch: int, *, mute: bool = False, step_s: float = 0.0, settles: bool = True) -> FakeWorker:
        """settles: return when an idle lane has completed its first step."""
        channel = LeaderChannel(self.context, HOST)
        worker = FakeWorker(self.context, channel)
        worker.mute, worker.step_s = mute, step_s
        self.workers.append(worker)
        channel.connect([worker.address])
        self.engine.attach(channel, epoch, 64).result(5)
        if settles and not mute:
            wait_for(lambda: self.engine.stats().result(5).state == "serving")
        return worker


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(write_model_folder(tmp_path), **getattr(request, "param", {}))
    yield bench
    bench.engine.close()
    for worker in bench.workers:
        worker.thread.join(timeout=10)
    bench.context.destroy(linger=0)


def params(max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, ignore_eos=True)


def test_tokens_come_in_order_and_the_summary_counts_them(bench: Bench) -> None:
    bench.wire(1)
    done = [bench.engine.generate(EngineRequest(f"r{i}", [10 + i] * 5, params(), "router")) for i in range(4)]
    for i, future in enumerate(done):
        summary = future.result(10)
        assert (summary.num_tokens, summary.finish_reason) == (20, "length")
        assert bench.sink.tokens(f"r{i}") == expected([10 + i], 20)


def test_logprobs_reach_whoever_asked(bench: Bench) -> None:
    bench.wire(1)
    asks = msgspec.structs.replace(params(), logprobs=1, prompt_logprobs=1)
    done = [bench.engine.generate(EngineRequest("asks", [10, 11, 12], asks, "router"))]
    done.append(bench.engine.generate(EngineRequest("does not", [10, 11, 12], params(), "router")))
    for future in done:
        future.result(10)
    mine = [delta for delta in bench.sink.deltas if delta.request_id == "asks"]
    assert [entry for delta in mine for entry in delta.logprobs or []] == [report(t) for t in expected([12], 20)]
    assert mine[0].prompt_logprobs == [report(11), report(12)]
    assert all(delta.prompt_logprobs is None for delta in mine[1:])
    others = [delta for delta in bench.sink.deltas if delta.request_id == "does not"]
    assert all(delta.logprobs is None and delta.prompt_logprobs is None for delta in others)


def test_a_form_that_no_answer_can_have_here_is_refused_by_name(bench: Bench) -> None:
    bench.wire(1)
    form = msgspec.structs.replace(params(), structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ConfigError, match="tokenizer.json"):  # the folder has none
        bench.engine.generate(EngineRequest("r", [5], form, "router")).result(5)
    assert bench.engine.generate(EngineRequest("ok", [5], params(2), "router")).result(5).num_tokens == 2


def test_a_request_that_cannot_run_is_refused_by_name(bench: Bench) -> None:
    bench.wire(1)
    with pytest.raises(ConfigError, match="max_model_len=512"):
        bench.engine.generate(EngineRequest("r", [5] * 600, params(), "router")).result(5)
    assert bench.engine.generate(EngineRequest("ok", [5], params(2), "router")).result(5).num_tokens == 2


def test_a_silent_worker_fails_the_epoch_by_the_step_deadline_and_requests_go_on_in_the_next(
    bench: Bench,
) -> None:
    silent = bench.wire(1, mute=True)
    done = bench.engine.generate(EngineRequest("r", [7, 8, 9], params(), "router"))
    assert bench.failed.wait(10)
    assert bench.failures[0][0] == 1
    error = bench.failures[0][1]
    assert isinstance(error, StepTimeout) and "step_timeout_s=0.5" in str(error)
    assert silent.stopped.wait(5), "a broken epoch is told to stop"
    bench.wire(2)
    assert done.result(10).num_tokens == 20
    assert bench.sink.tokens("r") == expected([9], 20)


def test_rewiring_in_the_middle_of_an_answer_changes_nothing_in_it(bench: Bench) -> None:
    bench.wire(1)
    done = bench.engine.generate(EngineRequest("r", [7, 8, 9], params(300), "router"))
    while len(bench.sink.tokens("r")) < 40:
        time.sleep(0.002)
    bench.engine.detach("healing").result(5)
    bench.wire(2)
    assert done.result(20).num_tokens == 300
    assert bench.sink.tokens("r") == expected([9], 300)


def test_an_aborted_request_ends_and_frees_its_blocks(bench: Bench) -> None:
    bench.wire(1)
    done = bench.engine.generate(EngineRequest("r", [7, 8, 9], params(500), "router"))
    while not bench.sink.tokens("r"):
        time.sleep(0.002)
    bench.engine.abort("r").result(5)
    assert done.result(5).finish_reason == "abort"
    stats = bench.engine.stats().result(5)
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)


def test_requests_of_a_router_that_is_gone_are_given_up(bench: Bench) -> None:
    bench.sink.gone.add("dead router")
    bench.wire(1)
    assert bench.engine.generate(EngineRequest("r", [7], params(500), "dead router")).result(5).finish_reason == "abort"


def test_stats_tell_the_state_and_come_even_when_idle(bench: Bench) -> None:
    bench.wire(1)
    seen = len(bench.sink.lane_stats)
    time.sleep(1.5)
    assert len(bench.sink.lane_stats) > seen
    assert bench.sink.lane_stats[-1].state == "serving"
    assert bench.sink.lane_stats[-1].epoch == 1


@pytest.mark.parametrize("bench", [{"pipeline_parallel_size": 2}], indirect=True)
def test_the_expert_load_of_a_lane_is_that_of_all_its_stages_and_steps(bench: Bench) -> None:
    bench.wire(1)
    assert bench.engine.stats().result(5).expert_tokens == [], "a dense model has none"
    for _ in range(2):
        bench.engine.call(lambda: bench.engine._epoch.step_times.scheduled(0.0, 0))
    for stats in (
        WorkerStats(1, 0, [(0.0, 0.1)], [1, 2, 3], [1.5, 2.5]),
        WorkerStats(1, 1, [(0.1, 0.2)], [10, 20, 30], [2.0]),
        WorkerStats(1, 1, [(0.3, 0.4)]),  # a stage without a mixture, or no step since
        WorkerStats(1, 0, [(0.2, 0.3)], [100, 200, 300], [1.0, 1.5]),
    ):
        bench.engine.call(lambda stats=stats: bench.engine._stats.add_worker(stats, bench.engine._epoch.step_times))
    stats = bench.engine.stats().result(5)
    assert stats.expert_tokens == [111, 222, 333]
    assert stats.expert_imbalance == 1.5
    assert stats.model_s == pytest.approx(0.4 + 0.001)  # of the lane's first step


def test_the_time_of_steps_is_told_apart(bench: Bench) -> None:
    bench.wire(1)
    bench.engine.generate(EngineRequest("r", [7], params(), "router")).result(10)
    deadline = time.monotonic() + 5
    while (stats := bench.engine.stats().result(5)).model_s < 0.0209:  # the last report comes behind the last result
        assert time.monotonic() < deadline
    assert stats.num_steps == 1 + 20, "the first step shows that the lane is alive"
    assert stats.model_s == pytest.approx(21 * 0.001, rel=0.01)
    assert stats.schedule_s > 0


class Recorder(StepTimes):
    def __init__(self) -> None:
        super().__init__(1)
        self.steps_back: list[int] = []

    def scheduled(self, at: float, steps_back: int) -> None:
        self.steps_back.append(steps_back)
        super().scheduled(at, steps_back)


@pytest.mark.parametrize("rule", [{}, {"frequency_penalty": 0.5}], ids=["async scheduling", "waits for its tokens"])
def test_a_step_is_timed_from_the_step_whose_tokens_it_needs(bench: Bench, rule: dict[str, float]) -> None:
    bench.wire(1)
    recorder = Recorder()
    bench.engine.call(lambda: setattr(bench.engine._epoch, "step_times", recorder)).result(5)
    bench.engine.generate(EngineRequest("r", [7], msgspec.structs.replace(params(4), **rule), "router")).result(10)
    assert recorder.steps_back == [0, 1, 1, 1]


def test_a_step_has_its_time_from_when_it_is_the_oldest(bench: Bench) -> None:
    bench.wire(1, step_s=0.3)
    assert bench.engine.generate(EngineRequest("r", [7], params(4), "router")).result(10).num_tokens == 4
    assert not bench.failures, "the second was sent 0.6 s before its result, and step_timeout_s is 0.5"


def test_an_id_may_be_used_again_at_once(bench: Bench) -> None:
    bench.wire(1)
    for _ in range(100):
        done = bench.engine.generate(EngineRequest("r", [7], params(1), "router"))
        while not done.done():
            again = bench.engine.generate(EngineRequest("r", [9], params(2), "router"))
            try:
                assert again.result(5).num_tokens == 2
            except ConfigError as error:
                assert "still running" in str(error)
        assert done.result(5).num_tokens == 1


def test_closing_fails_what_still_waits(bench: Bench) -> None:
    bench.wire(1, mute=True)
    done = bench.engine.generate(EngineRequest("r", [7], params(), "router"))
    bench.engine.close()
    bench.engine.close()
    with pytest.raises(RuntimeError, match="shut down"):
        done.result(5)


def test_whoever_gives_up_waiting_disturbs_nobody(bench: Bench) -> None:
    bench.wire(1)
    bench.engine.call(time.sleep, 0.2)
    bench.engine.stats().cancel()
    bench.engine.generate(EngineRequest("given up", [5], params(2), "router")).cancel()
    assert bench.engine.generate(EngineRequest("ok", [5], params(2), "router")).result(5).num_tokens == 2


def test_nobody_waits_for_an_engine_that_an_error_has_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bench.wire(1, mute=True)
    done = bench.engine.generate(EngineRequest("r", [7], params(), "router"))
    ended = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: ended.set())
    monkeypatch.setattr(bench.sink, "publish", lambda _: 1 / 0)
    assert ended.wait(10) and worker.stopped.wait(5)
    for future in (done, bench.engine.stats(), bench.engine.generate(EngineRequest("late", [7], params(), "router"))):
        with pytest.raises(RuntimeError, match="shut down"):
            future.result(5)


def test_whatever_is_asked_of_an_engine_while_it_closes_is_answered(bench: Bench) -> None:
    for _ in range(50):
        engine = Engine(bench.config, "lane", Sink(), lambda epoch, error: None)
        asked: list[Future[Any]] = []

        def ask(engine: Engine = engine, asked: list[Future[Any]] = asked) -> None:
            while not (asked and asked[-1].done() and asked[-1].exception()):
                asked.append(engine.stats())

        asker = threading.Thread(target=ask)
        asker.start()
        engine.close()
        asker.join(10)
        assert not asker.is_alive()
        for future in asked:
            future.exception(5)


def test_router_links_forget_a_router_that_is_idle_for_long_and_find_it_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, router = RouterLinks(bench.context, HOST, "lane"), bench.context.socket(zmq.PULL)
    address = bind_random_port(router, HOST)
    for idle_s, num_kept in ((60.0, 1), (-1.0, 0), (60.0, 1)):
        monkeypatch.setattr(channel_module, "ROUTER_IDLE_S", idle_s)
        assert links.emit(address, [TokenDelta("a", 0, [1])])
        assert router.poll(5000) and router.recv()
        assert links.gone_readers([]) == set()
        assert len(links._routers) == num_kept
    links.close()
    router.close(linger=0)


def test_router_links_notice_a_router_that_dies_and_one_that_never_was() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    links, router = RouterLinks(context, HOST, "lane"), context.socket(zmq.PULL)
    address, nobody = bind_random_port(router, HOST), "tcp://127.0.0.1:9"
    assert links.emit(address, [TokenDelta("a", 0, [1])])
    assert router.poll(5000)
    assert links.gone_readers([address]) == set()
    router.close(linger=0)
    gone: set[str] = set()

    def all_noticed() -> bool:
        gone.update(links.gone_readers([address, nobody]))
        return gone == {address, nobody}

    wait_for(all_noticed)
    links.close()
    context.term()


def test_router_links_send_one_message_per_step_and_stats_to_whoever_listens() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    links = RouterLinks(context, HOST, "lane")
    router, listener = context.socket(zmq.PULL), context.socket(zmq.SUB)
    address = bind_random_port(router, HOST)
    listener.setsockopt(zmq.SUBSCRIBE, b"")
    listener.connect(links.stats_address)
    deltas = [TokenDelta("a", 0, [1]), TokenDelta("b", 3, [2], "stop", 2)]
    assert links.emit(address, deltas)
    assert router.poll(5000)
    assert msgspec.msgpack.decode(router.recv(), type=TokenBatch) == TokenBatch("lane", deltas)
    links.close()
    links.close()
    router.close(linger=0)
    listener.close(linger=0)
    context.term()


# -- what one request does stays with it -------------------------------------------------------------------------------


BAD_TOKEN = 97
"""Its step fails. No answer of the fake worker holds it."""


def generate_and_heal(bench: Bench, prompts: list[list[int]]) -> list[str]:
    """Finish reasons. Wires the lane anew after every failed step, as a supervisor does."""
    bench.wire(1, step_s=0.001).bad_token = BAD_TOKEN
    requests = [EngineRequest(f"r{i}", prompt, params(), "router") for i, prompt in enumerate(prompts)]
    done = [bench.engine.generate(request) for request in requests]
    for epoch in range(2, 40):
        while not bench.failed.wait(0.02):
            if all(future.done() for future in done):
                return [future.result().finish_reason for future in done]
        bench.failed.clear()
        bench.wire(epoch, step_s=0.001, settles=False).bad_token = BAD_TOKEN
    raise AssertionError("the lane was wired 40 times and the requests have not ended")


def test_a_request_whose_step_raises_ends_alone_with_its_reason(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    good = [[10 + i] * 5 for i in range(4)]
    reasons = generate_and_heal(bench, [*good[:2], [7, BAD_TOKEN, 8], *good[2:], [BAD_TOKEN]])
    assert reasons == ["length", "length", "error", "length", "length", "error"]
    assert "stage 1 rank 0: ValueError: bad" in bench.sink.last("r2").error
    for name, prompt in zip(["r0", "r1", "r3", "r4"], good, strict=True):
        assert bench.sink.tokens(name) == expected(prompt, 20)
    assert "request r2 ends" in caplog.text
    assert bench.engine.stats().result(5).num_running == 0


def test_lost_workers_blame_nobody(bench: Bench) -> None:
    bench.wire(1).mute = True
    done = [bench.engine.generate(EngineRequest(f"r{i}", [10 + i] * 5, params(), "router")) for i in range(4)]
    for epoch in range(2, 8):  # more often than a request may fail
        bench.wire(epoch, mute=epoch < 7)
        if epoch < 7:
            time.sleep(0.05)
            bench.engine.detach("healing").result(5)
    assert [future.result(10).finish_reason for future in done] == ["length"] * 4
    assert [bench.sink.tokens(f"r{i}") for i in range(4)] == [expected([10 + i], 20) for i in range(4)]


@pytest.mark.parametrize("bench", [{"step_timeout_s": 0.1}], indirect=True)
def test_a_request_that_hangs_every_step_ends_and_one_hang_blames_nobody(bench: Bench) -> None:
    bench.wire(1).mute = True
    done = [bench.engine.generate(EngineRequest(f"r{i}", [10 + i] * 5, params(), "router")) for i in range(2)]
    assert bench.failed.wait(5)
    bench.failed.clear()
    bench.wire(2)
    assert [future.result(10).finish_reason for future in done] == ["length"] * 2
    bench.workers[-1].mute = True
    last = bench.engine.generate(EngineRequest("last", [30] * 5, params(), "router"))
    for epoch in range(3, 6):
        assert bench.failed.wait(5)
        bench.failed.clear()
        bench.wire(epoch, mute=True)
    assert last.result(5).finish_reason == "error"
    assert "step_timeout_s=0.1" in bench.sink.last("last").error


def test_a_row_that_cannot_be_sampled_ends_its_request_only(bench: Bench) -> None:
    worker = bench.wire(1)
    worker.unsampled_token = 98
    bad = bench.engine.generate(EngineRequest("bad", [98], params(), "router"))
    good = bench.engine.generate(EngineRequest("good", [11] * 5, params(), "router"))
    assert bad.result(5).finish_reason == "error"
    assert good.result(5).finish_reason == "length"
    assert bench.sink.tokens("good") == expected([11], 20)
    assert "not finite" in bench.sink.last("bad").error
    assert not bench.failed.is_set()


# -- alive means it completes steps ------------------------------------------------------------------------------------


def test_an_idle_lane_serves_only_after_a_step(bench: Bench) -> None:
    bench.wire(1, mute=True)
    time.sleep(0.2)
    assert bench.sink.lane_stats[-1].state != "serving"
    assert bench.failed.wait(5), "the canary's step has a deadline"
    bench.wire(2)
    wait_for(lambda: bench.sink.lane_stats[-1].state == "serving")
    wait_for(lambda: bench.sink.lane_stats[-1].num_running == 0)


def test_an_idle_lane_goes_on_to_prove_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CANARY_PERIOD_S", 0.05)
    worker = bench.wire(1)
    wait_for(lambda: bench.sink.lane_stats[-1].num_steps > 3)
    worker.mute = True
    assert bench.failed.wait(5)


# -- an answer that began elsewhere ------------------------------------------------------------------------------------


def test_an_answer_goes_on_where_another_lane_left_it(bench: Bench) -> None:
    bench.wire(1)
    prompt, whole = [12] * 5, expected([12], 20)
    request = EngineRequest("r", prompt, params(), "router", output_token_ids=whole[:7], attempt=3)
    assert bench.engine.generate(request).result(5).num_tokens == 20
    assert [token for delta in bench.sink.deltas for token in delta.token_ids] == whole[7:]
    assert {delta.attempt for delta in bench.sink.deltas} == {3}
    assert bench.sink.deltas[0].offset == 7


def test_a_newer_attempt_ends_the_older_one(bench: Bench) -> None:
    bench.wire(1, step_s=0.01)
    old = bench.engine.generate(EngineRequest("r", [12] * 5, params(200), "router"))
    wait_for(lambda: bool(bench.sink.deltas))
    new = bench.engine.generate(EngineRequest("r", [12] * 5, params(), "router", attempt=1))
    assert old.result(5).finish_reason == "abort"
    assert new.result(5).num_tokens == 20
    with pytest.raises(ConfigError, match="still running"):
        running = bench.engine.generate(EngineRequest("s", [12] * 5, params(200), "router", attempt=1))
        bench.engine.generate(EngineRequest("s", [12] * 5, params(), "router", attempt=0)).result(5)
    assert not running.done()


def test_requests_of_a_dead_router_end(bench: Bench) -> None:
    bench.wire(1, step_s=0.01)
    orphan = bench.engine.generate(EngineRequest("orphan", [12] * 5, params(10_000 // 64), "dead"))
    other = bench.engine.generate(EngineRequest("other", [12] * 5, params(), "router"))
    wait_for(lambda: bool(bench.sink.deltas))
    bench.sink.dead.add("dead")
    assert orphan.result(1).finish_reason == "abort"
    assert other.result(5).finish_reason == "length"


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)

"""Random traffic against the scheduler, judged by a worker without a model.

The worker's "KV" of a token is a fingerprint of the whole prefix that ends with it. So a plan that would
attend to a slot with any other content than the sequence's own prefix (shared wrongly, evicted, freed and
reused, never written) is caught at once. The "model" is a fixed function of prefix, seed and position, so
the full answer of each request is known beforehand, whatever happens on the way.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.integrity import check_scheduler

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.scheduler import Scheduler
from stagemesh.stages.engine.step import ScheduledStep
from stagemesh.stages.messages.step import SampleSpec, StepPlan, StepResult

EOS = 0
NUM_TOKENS = 5
"""Few token ids, so that prompts share prefixes and answers often end."""


def fingerprint(parent: int, token_id: int) -> int:
    return hash((parent, token_id))


def sample(prefix: int, spec: SampleSpec) -> int:
    allowed = [token for token in range(NUM_TOKENS) if token not in spec.banned_token_ids]
    return allowed[hash((prefix, spec.seed, spec.position)) % len(allowed)]


def whole_answer(prompt: list[int], params: SamplingParams, max_model_len: int) -> tuple[list[int], str]:
    """What the request must answer, and why it ends: written down from the meaning of the parameters."""
    assert params.seed is not None
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    prefix = 1
    for token in prompt:
        prefix = fingerprint(prefix, token)
    answer: list[int] = []
    while True:
        banned = sorted({*params.stop_token_ids, EOS}) if len(answer) < params.min_tokens else []
        spec = SampleSpec(1.0, 1.0, 0, 0.0, params.seed, len(prompt) + len(answer), banned)
        answer.append(sample(prefix, spec))
        prefix = fingerprint(prefix, answer[-1])
        if answer[-1] in stops:
            return answer, "stop"
        if len(answer) == params.max_tokens or len(prompt) + len(answer) == max_model_len:
            return answer, "length"


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    answer: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer


@dataclass
class Flight:
    step: ScheduledStep
    plan: StepPlan
    result: list[int] | None = None


class FakeLane:
    """A scheduler with workers that run its plans in order and late, and remember what is in each slot."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.requests: dict[str, Request] = {}
        self.by_seq_id: dict[int, Request] = {}
        self.kv: dict[int, int] = {}
        self.flights: deque[Flight] = deque()
        self.sampled: dict[int, list[int]] = {}
        """By step: what the workers have sampled, delivered or not."""
        self.num_steps = 0
        self.num_ahead = 0
        """Tokens computed before the scheduler knew them."""
        self.num_requests = 0

    def add(self, prompt: list[int], params: SamplingParams, num_known: int = 0, priority: int = 0) -> str:
        """num_known: tokens of the answer that another lane has generated."""
        request_id = str(self.num_requests)
        self.num_requests += 1
        known = whole_answer(prompt, params, self.scheduler.max_model_len)[0][:-1][:num_known]
        sequence = self.scheduler.add_request(
            request_id, prompt, params, output_token_ids=known, attempt=num_known, priority=priority
        )
        self.requests[request_id] = self.by_seq_id[sequence.seq_id] = Request(prompt, params, known)
        return request_id

    @property
    def unfinished(self) -> list[str]:
        return [name for name, request in self.requests.items() if request.finish_reason is None]

    def abort(self, request_id: str) -> None:
        free_before = self.scheduler.blocks.num_free_blocks
        self.scheduler.abort_request(request_id)
        self.requests[request_id].finish_reason = "abort"
        assert self.scheduler.blocks.num_free_blocks >= free_before

    def schedule(self) -> bool:
        idle = not self.flights
        step = self.scheduler.schedule()
        if step is None:
            assert not (idle and self.scheduler.has_work), "work to do, but nothing scheduled"
            return False
        plan = step.to_plan(1, self.num_steps)
        self.num_steps += 1
        self._check_limits(plan)
        self.flights.append(Flight(step, plan))
        return True

    def run_next_plan(self) -> None:
        flight = next((flight for flight in self.flights if flight.result is None), None)
        if flight is not None:
            assert flight.step.to_plan(1, flight.plan.step) == flight.plan, "a plan must not depend on when it is built"
            flight.result = self.sampled[flight.plan.step] = self._execute(flight.plan)

    def deliver(self) -> None:
        if not self.flights:
            return
        if self.flights[0].result is None:
            self.run_next_plan()
        flight = self.flights.popleft()
        assert flight.result is not None
        for update in self.scheduler.process_result(flight.step, StepResult(1, flight.plan.step, flight.result)):
            request = self.requests[update.request_id]
            assert request.finish_reason is None, "a late result of a request that has ended"
            request.answer += update.token_ids
            request.finish_reason = update.finish_reason
            expected, reason = whole_answer(request.prompt, request.params, self.scheduler.max_model_len)
            assert request.answer == expected[: len(request.answer)], "a token lost, repeated or wrong"
            if update.finish_reason is not None:
                assert (request.answer, update.finish_reason) == (expected, reason)
                assert update.stop_token_id == (expected[-1] if reason == "stop" else None)

    def lose_everything(self) -> None:
        self.flights.clear()
        self.kv.clear()
        self.scheduler.preempt_all()

    def fail_step(self, rng: random.Random) -> None:
        """One of the steps in flight fails, and with it the epoch."""
        if not self.flights:
            return
        step = rng.choice(self.flights).step
        self.lose_everything()
        for delta in self.scheduler.blame(step, "it failed", is_hang=rng.random() < 0.5):
            self.requests[delta.request_id].finish_reason = delta.finish_reason
            assert (delta.finish_reason, delta.error, delta.token_ids) == ("error", "it failed", [])

    def drain(self) -> None:
        for _ in range(10_000):
            while self.schedule():
                check_scheduler(self.scheduler)
            self.deliver()
            check_scheduler(self.scheduler)
            if not self.scheduler.has_work and not self.flights:
                break
        assert not self.unfinished
        stats = self.scheduler.stats()
        assert stats.num_free_blocks == stats.num_blocks, "leaked blocks"
        assert stats.num_running == stats.num_waiting == len(self.scheduler._in_flight) == 0
        assert stats.queued_prefill_tokens == stats.running_kv_tokens == 0

    def _check_limits(self, plan: StepPlan) -> None:
        query_lens = np.frombuffer(plan.query_lens, np.int32)
        assert 0 < query_lens.sum() <= self.scheduler.max_num_batched_tokens
        assert query_lens.min() > 0
        assert len(plan.seq_ids) == len(set(plan.seq_ids)) <= self.scheduler.queues.max_num_seqs
        assert self.scheduler.stats().num_running <= self.scheduler.queues.max_num_seqs
        assert len(self.flights) <= self.scheduler.num_micro_batches
        ahead = self._placeholders(plan)
        for flight in self.flights:
            sampled = [s for s, spec in zip(flight.plan.seq_ids, flight.plan.samples, strict=True) if spec]
            rows = {seq_id: row for row, seq_id in enumerate(sampled) if seq_id in plan.seq_ids}
            assert rows == (ahead if flight.plan.step == plan.placeholder_step else {}), (
                "its last token is not to be had"
            )
        assert not ahead or plan.placeholder_step in [flight.plan.step for flight in self.flights]

    def _placeholders(self, plan: StepPlan) -> dict[int, int]:
        """Sequences of the plan whose token is left open → its row in what the feeding step samples."""
        token_ids = np.frombuffer(plan.token_ids, np.int32)
        ends = np.cumsum(np.frombuffer(plan.query_lens, np.int32))
        assert (token_ids[:-1] >= 0).all() or plan.placeholder_step >= 0
        return {
            s: -1 - int(token_ids[end - 1]) for s, end in zip(plan.seq_ids, ends, strict=True) if token_ids[end - 1] < 0
        }

    def _execute(self, plan: StepPlan) -> list[int]:
        """Runs one plan: first checks everything that it would read, then writes, then samples."""
        block_size = self.scheduler.block_size
        query_lens = np.frombuffer(plan.query_lens, np.int32).tolist()
        context_lens = np.frombuffer(plan.context_lens, np.int32).tolist()
        token_ids = np.frombuffer(plan.token_ids, np.int32).tolist()
        tables = np.frombuffer(plan.block_tables, np.int32).reshape(len(plan.seq_ids), plan.max_blocks)
        assert len(token_ids) == sum(query_lens)
        writes: dict[int, int] = {}
        reads: set[int] = set()
        result = []
        for index, seq_id in enumerate(plan.seq_ids):
            request = self.by_seq_id[seq_id]
            start, end = context_lens[index], context_lens[index] + query_lens[index]
            query, token_ids = token_ids[: end - start], token_ids[end - start :]
            tokens = request.tokens[:end]
            if query[0] < 0:
                self.num_ahead += 1
                query = [self.sampled[plan.placeholder_step][-1 - query[0]]]
                assert len(tokens) in (start, end), "more than one token ahead"
                tokens = tokens[:start] + query if len(tokens) == start else tokens
            assert query == tokens[start:end], "wrong tokens"
            prefix = 1
            for position, token in enumerate(tokens):
                prefix = fingerprint(prefix, token)
                block = int(tables[index, position // block_size])
                assert 0 <= block < self.scheduler.blocks.num_blocks
                slot = block * block_size + position % block_size
                if position < start:
                    assert self.kv.get(slot) == prefix, f"slot {slot} does not hold position {position}"
                    reads.add(slot)
                else:
                    assert slot not in writes, "two tokens are written to one slot"
                    writes[slot] = prefix
            spec = plan.samples[index]
            if spec is not None:
                assert end == len(tokens) == spec.position
                result.append(sample(prefix, spec))
        assert not token_ids
        assert not reads & writes.keys(), "a step reads a slot that it writes"
        self.kv.update(writes)
        return result


def draw_params(rng: random.Random, max_tokens: int) -> SamplingParams:
    max_tokens = rng.randint(1, max_tokens)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
        seed=rng.choice([rng.randrange(2**63), 7]),
        ignore_eos=rng.random() < 0.8,
        stop_token_ids=rng.choice([(), (), (), (1,)]),
    )


def draw_lane(rng: random.Random) -> FakeLane:
    return FakeLane(
        Scheduler(
            num_blocks=rng.randint(3, 24),
            block_size=rng.randint(1, 4),
            max_num_seqs=rng.randint(1, 8),
            max_num_batched_tokens=rng.randint(1, 24),
            max_model_len=rng.randint(2, 40),
            num_micro_batches=rng.randint(1, 4),
            eos_token_ids=(EOS,),
            enable_prefix_caching=rng.random() < 0.85,
        )
    )


def add_random_request(lane: FakeLane, rng: random.Random) -> None:
    scheduler = lane.scheduler
    most = min(scheduler.max_model_len, scheduler.blocks.num_blocks * scheduler.block_size + 1)
    num_prompt = rng.randint(1, rng.randint(1, most - 1))
    shared = [rng.randrange(2)] * rng.randint(0, num_prompt)
    prompt = shared + [rng.randrange(NUM_TOKENS) for _ in range(num_prompt - len(shared))]
    params = draw_params(rng, max_tokens=most - num_prompt)
    lane.add(prompt, params, rng.choice([0, 0, rng.randrange(8)]), rng.choice([0, 0, rng.randint(-100, 100)]))


@pytest.mark.parametrize("seed", range(100))
def test_random_traffic_is_answered_in_full_from_the_right_blocks(seed: int) -> None:
    rng = random.Random(seed)
    lane = draw_lane(rng)
    for _ in range(250):
        action = rng.random()
        if action < 0.15 and len(lane.unfinished) < 12:
            add_random_request(lane, rng)
        elif action < 0.18 and lane.unfinished:
            lane.abort(rng.choice(lane.unfinished))
        elif action < 0.19:
            lane.lose_everything()
        elif action < 0.20:
            lane.fail_step(rng)
        elif action < 0.55:
            lane.schedule()
        elif action < 0.75:
            lane.run_next_plan()
        else:
            lane.deliver()
        check_scheduler(lane.scheduler)
    lane.drain()


def test_random_traffic_meets_preemption_eviction_and_sharing() -> None:
    """The oracle above is worth something only if the traffic gets there."""
    num_preemptions = num_hits = num_stopped = num_ahead = 0
    for seed in range(30):
        rng = random.Random(seed)
        lane = draw_lane(rng)
        for _ in range(20):
            add_random_request(lane, rng)
        lane.drain()
        num_preemptions += lane.scheduler.stats().num_preemptions
        num_hits += lane.scheduler.stats().prefix_hits
        num_stopped += sum(request.finish_reason == "stop" for request in lane.requests.values())
        num_ahead += lane.num_ahead
    assert num_ahead > 300
    assert num_preemptions > 30
    assert num_hits > 100
    assert num_stopped > 30


class LaneMachine(RuleBasedStateMachine):
    """The same, with hypothesis looking for the shortest way to break it."""

    @initialize(
        num_blocks=st.integers(2, 8),
        block_size=st.integers(1, 3),
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.integers(1, 12),
        num_micro_batches=st.integers(1, 3),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_micro_batches: int,
    ) -> None:
        self.lane = FakeLane(
            Scheduler(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=num_blocks * block_size + 1,
                num_micro_batches=num_micro_batches,
                eos_token_ids=(EOS,),
            )
        )

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=10),
        max_tokens=st.integers(1, 8),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, min_tokens: int, ignore_eos: bool) -> None:
        prompt = prompt[: self.lane.scheduler.max_model_len - 1]
        params = SamplingParams(
            max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), seed=1, ignore_eos=ignore_eos
        )
        self.lane.add(prompt, params)

    @precondition(lambda self: self.lane.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.lane.abort(data.draw(st.sampled_from(self.lane.unfinished)))

    @rule()
    def schedule(self) -> None:
        self.lane.schedule()

    @precondition(lambda self: self.lane.flights)
    @rule()
    def run_next_plan(self) -> None:
        self.lane.run_next_plan()

    @precondition(lambda self: self.lane.flights)
    @rule()
    def deliver(self) -> None:
        self.lane.deliver()

    @rule()
    def lose_everything(self) -> None:
        self.lane.lose_everything()

    @invariant()
    def books_are_straight(self) -> None:
        if hasattr(self, "lane"):
            check_scheduler(self.lane.scheduler)

    def teardown(self) -> None:
        if hasattr(self, "lane"):
            self.lane.drain()


LaneMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLaneMachine = LaneMachine.TestCase

"""The scheduler's rules, one at a time, with made-up tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
from support.integrity import check_scheduler

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine import scheduler as scheduler_module
from stagemesh.stages.engine.scheduler import MIN_SHARE_TOKENS, Scheduler
from stagemesh.stages.engine.sequence import SequenceStatus
from stagemesh.stages.engine.step import ScheduledStep
from stagemesh.stages.messages.request import TokenDelta
from stagemesh.stages.messages.step import StepPlan, StepResult

EOS = 2
STOP = 3
WORD = 9


def make(**changes: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(**(settings | changes))


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 20, "seed": 0} | changes))


def prompt(num_tokens: int, first: int = 10) -> list[int]:
    return list(range(first, first + num_tokens))


def shape(step: ScheduledStep | None) -> list[tuple[str, int, int]]:
    """Request, first token and number of tokens of each sequence in the step."""
    assert step is not None
    return [(entry.sequence.request_id, entry.start, entry.num_tokens) for entry in step.entries]


def answer(scheduler: Scheduler, step: ScheduledStep | None, token_id: int = WORD) -> list[TokenDelta]:
    assert step is not None
    num_sampled = sum(entry.is_sampled for entry in step.entries)
    return scheduler.process_result(step, StepResult(0, 0, [token_id] * num_sampled))


def run(scheduler: Scheduler, token_id: int = WORD) -> list[TokenDelta]:
    """One step from start to end."""
    return answer(scheduler, scheduler.schedule(), token_id)


def run_to_end(scheduler: Scheduler) -> None:
    for _ in range(1000):
        if not scheduler.has_work:
            return
        run(scheduler)
        check_scheduler(scheduler)
    raise AssertionError("never ends")


# ---- admission ---------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        make().add_request("a", [], params())


@pytest.mark.parametrize("num_tokens", [128, 500])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_numbers(num_tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_tokens} tokens .*max_model_len=128"):
        make().add_request("a", prompt(num_tokens), params())


def test_a_request_that_the_whole_cache_could_not_hold_is_refused_with_the_numbers() -> None:
    scheduler = make(num_blocks=4)
    with pytest.raises(ConfigError, match=r"10 tokens .*max_tokens=8 .*17 tokens.*max_model_len=128.*16"):
        scheduler.add_request("a", prompt(10), params(max_tokens=8))
    scheduler.add_request("a", prompt(10), params(max_tokens=7))
    run_to_end(scheduler)


def test_a_request_id_is_refused_while_it_runs_and_may_be_used_again_afterwards() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params())
    with pytest.raises(ConfigError, match="request_id"):
        scheduler.add_request("a", prompt(3), params())
    scheduler.abort_request("a")
    scheduler.add_request("a", prompt(3), params())


def test_a_refused_request_leaves_nothing_behind() -> None:
    scheduler = make()
    with pytest.raises(ConfigError):
        scheduler.add_request("a", [], params())
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(name, prompt(2), params(max_tokens=2))
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a", "b"]
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting) == (2, 1)


# ---- batching ----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_and_sampled_at_its_end_only() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add_request("a", prompt(25), params())
    assert shape(step := scheduler.schedule()) == [("a", 0, 10)]
    assert answer(scheduler, step) == []
    assert shape(step := scheduler.schedule()) == [("a", 10, 10)]
    assert answer(scheduler, step) == []
    assert shape(step := scheduler.schedule()) == [("a", 20, 5)]
    assert answer(scheduler, step)[0].token_ids == [WORD]
    assert shape(scheduler.schedule()) == [("a", 25, 1)]


def test_decoding_goes_first_and_prompts_fill_the_rest_of_the_budget() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add_request("a", prompt(4), params())
    scheduler.add_request("b", prompt(4, 50), params())
    run(scheduler)
    scheduler.add_request("c", prompt(12, 90), params())
    scheduler.add_request("d", prompt(12, 120), params())
    assert shape(step := scheduler.schedule()) == [("a", 4, 1), ("b", 4, 1), ("c", 0, 8)]
    answer(scheduler, step)
    assert shape(scheduler.schedule()) == [("a", 5, 1), ("b", 5, 1), ("c", 8, 4), ("d", 0, 4)]


def test_one_step_more_than_micro_batches_is_in_flight() -> None:
    scheduler = make(num_micro_batches=2, max_num_seqs=8)
    for name in "abcd":
        scheduler.add_request(name, prompt(2), params())
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert len(shape(first)) == 4
    assert shape(second) == [("a", 2, 1), ("b", 2, 1)], "half of them, ahead of their tokens"
    assert shape(third) == [("c", 2, 1), ("d", 2, 1)]
    scheduler.add_request("e", prompt(2), params())
    assert scheduler.schedule() is None
    answer(scheduler, first)
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a", "b", "e"]
    assert scheduler.schedule() is None


def test_decoding_sequences_stay_evenly_split_when_some_of_them_end() -> None:
    scheduler = make(num_micro_batches=2, max_num_seqs=16, num_blocks=200)
    for number in range(12):
        scheduler.add_request(str(number), prompt(2), params(max_tokens=3 if number < 4 else 50))
    run(scheduler)
    flights = [scheduler.schedule(), scheduler.schedule()]
    for _ in range(12):
        answer(scheduler, flights.pop(0))
        flights.append(scheduler.schedule())
    assert [len(shape(step)) for step in flights] == [4, 4]


def test_a_single_sequence_never_waits_although_micro_batches_are_free() -> None:
    scheduler = make(num_micro_batches=4)
    scheduler.add_request("a", prompt(3), params(max_tokens=5))
    flights = [scheduler.schedule()]
    for _ in range(4):
        flights.append(scheduler.schedule())
        assert scheduler.schedule() is None, "two tokens ahead would be too many"
        answer(scheduler, flights.pop(0))
    assert scheduler.schedule() is None, "the token that comes is the last"
    assert answer(scheduler, flights[0])[0].finish_reason == "length"
    assert not scheduler.has_work


def test_chunks_of_one_prompt_follow_each_other_through_the_pipeline_in_even_parts() -> None:
    num_tokens = 4 * MIN_SHARE_TOKENS
    scheduler = make(num_micro_batches=2, max_num_batched_tokens=8192, max_model_len=4096, num_blocks=1024)
    scheduler.add_request("a", prompt(num_tokens), params())
    half = num_tokens // 2
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shape(first) == [("a", 0, half)]
    assert shape(second) == [("a", half, half)]
    assert answer(scheduler, first) == []
    assert shape(scheduler.schedule()) == [("a", num_tokens, 1)]
    assert len(answer(scheduler, second)) == 1


def test_a_short_prompt_is_not_cut_for_the_sake_of_balance() -> None:
    scheduler = make(num_micro_batches=4, max_num_batched_tokens=8192, max_model_len=4096, num_blocks=1024)
    scheduler.add_request("a", prompt(MIN_SHARE_TOKENS), params())
    assert shape(scheduler.schedule()) == [("a", 0, MIN_SHARE_TOKENS)]


# ---- async scheduling --------------------------------------------------------------------------------------


def test_a_step_scheduled_ahead_has_placeholders_for_the_tokens_that_it_does_not_know() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add_request("embedding", prompt(2), params(pooling=PoolingParams()))
    scheduler.add_request("a", prompt(2, 20), params())
    scheduler.add_request("b", prompt(2, 40), params())
    first = scheduler.schedule()
    scheduler.add_request("c", prompt(2, 60), params())
    second = scheduler.schedule()
    assert first is not None and second is not None
    assert shape(second) == [("a", 2, 1), ("b", 2, 1), ("c", 0, 2)]
    plan = second.to_plan(1, 7)
    assert (ints(plan.token_ids), plan.placeholder_step) == ([-1, -2, 60, 61], 6)
    assert [spec.position for spec in plan.samples if spec is not None] == [3, 3, 2]
    assert first.to_plan(1, 6).placeholder_step == -1
    scheduler.process_result(first, StepResult(1, 6, [WORD, WORD], pooled=[b""]))
    assert second.to_plan(1, 7) == plan
    check_scheduler(scheduler)


def test_what_was_scheduled_for_a_sequence_that_has_ended_is_dropped() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params())
    first, second = scheduler.schedule(), scheduler.schedule()
    assert answer(scheduler, first, EOS)[0].finish_reason == "stop"
    assert scheduler.stats().num_free_blocks == scheduler.blocks.num_blocks
    assert answer(scheduler, second) == []
    assert not scheduler.has_work


@pytest.mark.parametrize("rule", [{"frequency_penalty": 0.5}, {"bad_words_token_ids": ((5, 6),)}])
def test_while_a_request_needs_its_tokens_async_scheduling_pauses(rule: dict[str, Any]) -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params())
    scheduler.add_request("b", prompt(3, 50), params(max_tokens=2, **rule))
    for _ in range(2):
        step = scheduler.schedule()
        assert scheduler.schedule() is None
        answer(scheduler, step)
    assert [shape(scheduler.schedule()) for _ in range(2)] == [[("a", 4, 1)], [("a", 5, 1)]]


def test_a_block_whose_last_token_was_a_placeholder_is_found_once_that_is_known() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params())
    flights = [scheduler.schedule(), scheduler.schedule()]  # the second fills the first block
    check_scheduler(scheduler)
    answer(scheduler, flights.pop(0))
    flights.append(scheduler.schedule())
    scheduler.add_request("b", [*prompt(3), WORD, 50], params())
    answer(scheduler, flights.pop(0))
    assert shape(scheduler.schedule()) == [("a", 5, 1), ("b", 4, 1)]
    check_scheduler(scheduler)


def test_the_blocks_of_an_answer_with_placeholders_serve_the_next_turn_to_the_last() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(6), params(max_tokens=7))
    flights = [scheduler.schedule(), scheduler.schedule()]
    while scheduler.has_work:
        answer(scheduler, flights.pop(0))
        flights += [step for step in [scheduler.schedule()] if step is not None]
        check_scheduler(scheduler)
    scheduler.add_request("b", [*prompt(6), *[WORD] * 7, 55], params())
    assert shape(scheduler.schedule()) == [("b", 12, 2)]


def test_a_sequence_that_could_make_room_for_an_older_one_gets_no_placeholder() -> None:
    scheduler = make(num_micro_batches=2, block_size=16, num_blocks=4)
    scheduler.add_request("a", prompt(14), params())
    scheduler.add_request("b", prompt(1, 50), params())
    run(scheduler)
    scheduler.blocks.allocate(2)  # by somebody else, for good
    flights = [scheduler.schedule(), scheduler.schedule(), scheduler.schedule()]
    assert [shape(step) for step in flights] == [[("a", 14, 1)], [("b", 1, 1)], [("a", 15, 1)]]
    answer(scheduler, flights.pop(0))
    assert shape(step := scheduler.schedule()) == [("b", 2, 1)]
    flights.append(step)
    answer(scheduler, flights.pop(0))
    assert scheduler.schedule() is None, "a waits for a block, and b for its token"
    answer(scheduler, flights.pop(0))
    assert scheduler.schedule() is None, "b is in flight still, but goes on no more"
    answer(scheduler, flights.pop(0))
    assert shape(scheduler.schedule()) == [("a", 16, 1)]
    assert scheduler.stats().num_preemptions == 1


# ---- prefix cache ------------------------------------------------------------------------------------------


def test_a_later_request_takes_the_common_blocks_from_the_cache() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(10), params(max_tokens=1))
    assert run(scheduler)[0].num_cached_tokens == 0
    scheduler.add_request("b", prompt(10), params(max_tokens=1))
    assert shape(step := scheduler.schedule()) == [("b", 8, 2)]
    assert answer(scheduler, step)[0].num_cached_tokens == 8
    assert (scheduler.stats().prefix_queries, scheduler.stats().prefix_hits) == (20, 8)


def test_only_requests_of_one_salt_share_blocks() -> None:
    scheduler = make()
    cached = []
    for name, salt in (("a", ""), ("b", "x"), ("c", "x"), ("d", "y"), ("e", "")):
        scheduler.add_request(name, prompt(10), params(max_tokens=1), cache_salt=salt)
        cached.append(run(scheduler)[0].num_cached_tokens)
    assert cached == [0, 0, 8, 0, 8]


def test_the_last_prompt_token_is_computed_even_if_all_blocks_are_cached() -> None:
    scheduler = make()
    for _ in range(2):
        scheduler.add_request("a", prompt(8), params(max_tokens=1))
        step = scheduler.schedule()
        answer(scheduler, step)
    assert shape(step) == [("a", 4, 4)]


def test_blocks_filled_while_decoding_serve_the_next_turn_of_a_conversation() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(6), params(max_tokens=7))
    run_to_end(scheduler)
    scheduler.add_request("b", [*prompt(6), *[WORD] * 7, 55], params())
    assert shape(scheduler.schedule()) == [("b", 12, 2)]


def test_a_running_request_shares_the_blocks_that_it_has_filled() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(9), params())
    run(scheduler)
    scheduler.add_request("b", prompt(9), params())
    step = scheduler.schedule()
    assert shape(step) == [("a", 9, 1), ("b", 8, 1)]
    assert step is not None
    first, second = (entry.block_table for entry in step.entries)
    assert first[:2] == second[:2] and first[2] != second[2]


def test_a_twin_waits_one_step_to_share_what_is_being_computed() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(9), params())
    scheduler.add_request("b", prompt(9), params())
    assert shape(step := scheduler.schedule()) == [("a", 0, 9)]
    answer(scheduler, step)
    assert shape(scheduler.schedule()) == [("a", 9, 1), ("b", 8, 1)]


def test_without_prefix_caching_nothing_is_shared() -> None:
    scheduler = make(enable_prefix_caching=False)
    for name in "ab":
        scheduler.add_request(name, prompt(9), params(max_tokens=1))
        assert shape(step := scheduler.schedule()) == [(name, 0, 9)]
        answer(scheduler, step)
    assert scheduler.stats().prefix_queries == 0


# ---- preemption --------------------------------------------------------------------------------------------


def test_when_blocks_run_out_the_latest_request_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = make(num_blocks=4, max_model_len=17)
    scheduler.add_request("a", prompt(3), params(max_tokens=12))
    scheduler.add_request("b", prompt(3, 50), params(max_tokens=12))
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    while scheduler.has_work:
        for update in run(scheduler):
            tokens[update.request_id] += update.token_ids
        check_scheduler(scheduler)
    assert scheduler.stats().num_preemptions == 1
    assert tokens == {"a": [WORD] * 12, "b": [WORD] * 12}


def test_a_newcomer_waits_until_every_running_sequence_could_grow_by_a_block() -> None:
    scheduler = make(num_blocks=5, max_model_len=17)
    scheduler.add_request("a", prompt(9), params(max_tokens=2))
    run(scheduler)
    scheduler.add_request("b", prompt(5, 50), params(max_tokens=2))
    assert scheduler.stats().num_free_blocks == 2
    assert shape(step := scheduler.schedule()) == [("a", 9, 1)]
    answer(scheduler, step)
    assert shape(scheduler.schedule()) == [("b", 0, 5)]


def test_a_preempted_request_goes_before_those_that_have_not_run() -> None:
    scheduler = make(num_blocks=4, max_model_len=17, max_num_seqs=2)
    for first, name in enumerate("abc"):
        scheduler.add_request(name, prompt(3, 50 * first), params(max_tokens=12))
    while scheduler.stats().num_preemptions == 0:
        run(scheduler)
    assert [sequence.request_id for sequence in scheduler.queues.waiting] == ["b", "c"]


def test_the_oldest_waits_for_a_step_in_flight_rather_than_throw_its_work_away() -> None:
    scheduler = make(num_blocks=4, num_micro_batches=2, max_model_len=17)
    scheduler.add_request("a", prompt(3), params(max_tokens=12))
    scheduler.add_request("b", prompt(3, 50), params(max_tokens=12))
    run(scheduler)
    flights = [scheduler.schedule(), scheduler.schedule()]
    num_waits = 0
    while scheduler.stats().num_preemptions == 0:
        answer(scheduler, flights.pop(0))
        if step := scheduler.schedule():
            flights.append(step)
        else:
            num_waits += 1
        for step in flights:
            assert step is not None
            assert all(entry.sequence.status is SequenceStatus.RUNNING for entry in step.entries)
        check_scheduler(scheduler)
    assert num_waits == 1
    for step in flights:
        answer(scheduler, step)
    run_to_end(scheduler)


# ---- the end of a request ----------------------------------------------------------------------------------


def test_max_tokens_ends_with_length() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params(max_tokens=2))
    assert run(scheduler)[0].finish_reason is None
    assert run(scheduler)[0].finish_reason == "length"
    assert not scheduler.has_work
    assert scheduler.stats().num_free_blocks == scheduler.blocks.num_blocks


def test_max_model_len_ends_with_length() -> None:
    scheduler = make(max_model_len=5)
    scheduler.add_request("a", prompt(3), params(max_tokens=100))
    assert run(scheduler)[0].finish_reason is None
    assert run(scheduler)[0].finish_reason == "length"


@pytest.mark.parametrize("token_id", [EOS, STOP])
def test_a_stop_token_ends_with_stop_and_is_the_last_token(token_id: int) -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params(stop_token_ids=(STOP,)))
    (update,) = run(scheduler, token_id)
    assert (update.token_ids, update.finish_reason, update.stop_token_id) == ([token_id], "stop", token_id)


def test_ignore_eos_ignores_eos_but_not_stop_token_ids() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params(stop_token_ids=(STOP,), ignore_eos=True))
    assert run(scheduler, EOS)[0].finish_reason is None
    assert run(scheduler, STOP)[0].finish_reason == "stop"


def test_stop_and_eos_are_banned_until_min_tokens_exist() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params(stop_token_ids=(STOP,), min_tokens=2))
    banned = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step is not None
        (spec,) = step.to_plan(1, 0).samples
        assert spec is not None
        banned.append(spec.banned_token_ids)
        answer(scheduler, step)
    assert banned == [[EOS, STOP], [EOS, STOP], []]


def test_abort_frees_blocks_at_once_and_drops_the_late_result() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(9), params())
    scheduler.add_request("b", prompt(9, 50), params())
    step = scheduler.schedule()
    scheduler.abort_request("a")
    assert scheduler.stats().num_free_blocks == scheduler.blocks.num_blocks - 3
    assert [update.request_id for update in answer(scheduler, step)] == ["b"]
    scheduler.abort_request("b")
    scheduler.abort_request("never heard of")
    assert not scheduler.has_work
    check_scheduler(scheduler)


def test_a_late_result_does_not_reach_a_new_request_with_the_same_id() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(3), params())
    step = scheduler.schedule()
    scheduler.abort_request("a")
    scheduler.add_request("a", prompt(5), params())
    assert answer(scheduler, step) == []
    assert shape(scheduler.schedule()) == [("a", 0, 5)]


def test_after_a_loss_of_the_kv_everything_is_computed_again_from_the_tokens() -> None:
    scheduler = make(num_micro_batches=2)
    scheduler.add_request("a", prompt(9), params(max_tokens=5))
    scheduler.add_request("b", prompt(9, 50), params(max_tokens=5))
    run(scheduler)
    scheduler.schedule()
    scheduler.schedule()
    scheduler.add_request("c", prompt(2), params(max_tokens=5))
    scheduler.preempt_all()
    check_scheduler(scheduler)
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting, len(scheduler._in_flight)) == (0, 3, 0)
    assert scheduler.stats().num_free_blocks == scheduler.blocks.num_blocks
    assert shape(scheduler.schedule()) == [("a", 0, 10), ("b", 0, 10), ("c", 0, 2)]


# ---- one request among others ------------------------------------------------------------------------------


def test_priorities_go_first_and_age(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now)
    scheduler = make(max_num_seqs=1)
    for name, priority in (("usual", 0), ("late", 3), ("urgent", -2), ("twin", 0)):
        scheduler.add_request(name, prompt(5), params(max_tokens=1), priority=priority)
    now += 29
    scheduler.add_request("after 29 s", prompt(5), params(max_tokens=1))
    now += 2
    scheduler.add_request("after 31 s", prompt(5), params(max_tokens=1))
    check_scheduler(scheduler)
    order = [run(scheduler)[0].request_id for _ in range(6)]
    assert order == ["urgent", "usual", "twin", "after 29 s", "late", "after 31 s"]


def test_a_step_that_failed_is_tried_one_sequence_at_a_time() -> None:
    scheduler = make()
    for i, name in enumerate("abc"):
        scheduler.add_request(name, prompt(5, 10 * i), params(max_tokens=9))
    step = scheduler.schedule()
    assert step is not None and len(step.entries) == 3
    scheduler.add_request("d", prompt(5, 90), params(max_tokens=1))
    scheduler.preempt_all()
    assert scheduler.blame(step, "it raised") == []
    for name in "ab":
        for num_known in (5, 1):  # the prompt, and a decode
            alone = scheduler.schedule()
            assert [request_id for request_id, _, _ in shape(alone)] == [name]
            assert shape(alone)[0][2] == num_known
            assert scheduler.schedule() is None
            answer(scheduler, alone)
            check_scheduler(scheduler)
    alone = scheduler.schedule()
    assert alone is not None and shape(alone) == [("c", 0, 5)]
    scheduler.preempt_all()
    (delta,) = scheduler.blame(alone, "it raised again")
    assert (delta.request_id, delta.finish_reason, delta.error) == ("c", "error", "it raised again")
    assert [name for name, _, _ in shape(scheduler.schedule())] == ["a", "b", "d"]


def test_who_fails_in_company_only_ends_at_last() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(5), params(max_tokens=99))
    scheduler.add_request("b", prompt(5, 50), params(max_tokens=99))
    guilty: list[TokenDelta] = []
    for _ in range(20):
        step = scheduler.schedule()
        assert step is not None
        if len(step.entries) == 1:
            answer(scheduler, step)
        else:
            scheduler.preempt_all()
            guilty += scheduler.blame(step, "together")
        if guilty:
            break
    assert [delta.request_id for delta in guilty] == ["a", "b"]
    assert not scheduler.has_work


def test_a_whole_answer_cannot_go_on() -> None:
    scheduler = make()
    with pytest.raises(ConfigError, match="3 tokens are a whole answer"):
        scheduler.add_request("a", prompt(5), params(max_tokens=3), output_token_ids=[7, 8, 9])
    assert not scheduler.has_work


# ---- plans and counts --------------------------------------------------------------------------------------


def ints(data: bytes) -> list[int]:
    return list(array("i", data))


def test_a_plan_says_everything_a_worker_needs() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(5), params(temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-2))
    run(scheduler)
    scheduler.add_request("b", prompt(3, 50), params(seed=5, temperature=0.0, top_k=7))
    step = scheduler.schedule()
    assert step is not None
    plan = step.to_plan(epoch=3, step=8)
    assert (plan.epoch, plan.step, plan.max_blocks) == (3, 8, 2)
    assert plan.seq_ids == [0, 1]
    assert ints(plan.query_lens) == [1, 3]
    assert ints(plan.context_lens) == [5, 0]
    assert ints(plan.token_ids) == [WORD, 50, 51, 52]
    (first, second), tables = (entry.block_table for entry in step.entries), ints(plan.block_tables)
    assert tables == [*first, *second, -1]
    a, b = plan.samples
    assert a is not None and b is not None
    assert (a.temperature, a.top_p, a.top_k, a.min_p) == (0.5, 0.9, 0, 0.1)
    assert (a.seed, a.position) == (2**64 - 2, 6)
    assert (b.seed, b.position, b.top_k) == (5, 3, 7)


def test_a_plan_can_be_built_after_its_sequence_is_gone() -> None:
    scheduler = make()
    scheduler.add_request("a", prompt(5), params())
    step = scheduler.schedule()
    assert step is not None
    before: StepPlan = step.to_plan(1, 1)
    scheduler.abort_request("a")
    assert step.to_plan(1, 1) == before


def test_counts_follow_the_tokens() -> None:
    scheduler = make(max_num_batched_tokens=6)
    scheduler.add_request("a", prompt(8), params(max_tokens=2))
    scheduler.add_request("b", prompt(5, 50), params(max_tokens=2))
    assert scheduler.stats()._asdict() == {
        "num_running": 0,
        "num_waiting": 2,
        "room": 8,
        "queued_prefill_tokens": 13,
        "running_kv_tokens": 0,
        "num_blocks": 64,
        "num_free_blocks": 64,
        "num_preemptions": 0,
        "prefix_queries": 0,
        "prefix_hits": 0,
        "prompt_tokens": 0,
        "generation_tokens": 0,
    }
    run(scheduler)
    stats = scheduler.stats()
    assert (stats.queued_prefill_tokens, stats.running_kv_tokens) == (7, 6)
    assert (stats.prompt_tokens, stats.num_free_blocks) == (8, 62)
    run_to_end(scheduler)
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (13, 4)
    assert stats.num_free_blocks == 64


# ---- the integrity check can fail --------------------------------------------------------------------------


def _busy() -> Scheduler:
    scheduler = make(num_micro_batches=2, max_num_seqs=2)
    for first, name in enumerate("abcd"):
        scheduler.add_request(name, prompt(9, 50 * first), params())
    run(scheduler)
    scheduler.schedule()
    check_scheduler(scheduler)
    return scheduler


def _set(name: str, value: Any, index: int = 0) -> Callable[[Scheduler], None]:
    return lambda scheduler: setattr(scheduler.queues.running[index], name, value)


CORRUPTIONS: dict[str, Callable[[Scheduler], Any]] = {
    "a running sequence without its blocks": _set("block_table", array("i")),
    "more computed tokens than slots": _set("num_computed_tokens", 13),
    "more computed tokens than known": _set("num_computed_tokens", 11),
    "two tokens ahead": lambda s: (s.schedule(), _set("num_computed_tokens", 12)(s)),
    "a wrong number of plans in flight": _set("num_in_flight", 2),
    "a running sequence that says it waits": _set("status", SequenceStatus.WAITING),
    "a sequence past its end": _set("max_num_tokens", 3),
    "running out of order": lambda s: s.queues.running.reverse(),
    "waiting out of order": lambda s: s.queues.waiting.reverse(),
    "a sequence in two queues": lambda s: s.queues.waiting.appendleft(s.queues.running[0]),
    "a waiting sequence that is lost": lambda s: s.queues.waiting.pop(),
    "a running sequence that is lost": lambda s: s.queues.running.pop(),
    "a finished sequence that is kept": lambda s: s._sequences.update(z=s._sequences["a"]),
    "a waiting sequence that holds blocks": lambda s: s.queues.waiting[0].block_table.append(0),
    "two sequences with one unfinished block": lambda s: s.queues.running[0].block_table.__setitem__(
        2, s.queues.running[1].block_table[2]
    ),
    "a block under another content's hash": lambda s: s.queues.running[0].block_hashes.reverse(),
    "a step in flight that is lost": lambda s: s._in_flight.clear(),
    "too many running": lambda s: setattr(s.queues, "max_num_seqs", 1),
    "too many in flight": lambda s: setattr(s, "num_micro_batches", -1),
    "a block published before it is full": _set("num_published_blocks", 3),
    "filled blocks that are not published": lambda s: s.queues._filled.update({b"x": 1}),
    "a leaked block": lambda s: s.blocks.allocate(1),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_integrity_finds(corruption: str) -> None:
    scheduler = _busy()
    CORRUPTIONS[corruption](scheduler)
    with pytest.raises(AssertionError):
        check_scheduler(scheduler)

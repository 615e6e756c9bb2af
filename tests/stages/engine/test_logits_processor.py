"""Penalties, biases and bans by request: what the leader sends for each token, and that nothing disturbs it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from support.toy_lane import ToyLane, answer_alone, ints, spec_of

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.logits_processor import LogitsProcessor

VOCAB_SIZE = 60
EOS = 1


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 40, "seed": 3, "ignore_eos": True} | changes))


def lane(**changes: Any) -> ToyLane:
    return ToyLane(VOCAB_SIZE, eos_token_id=EOS, **changes)


def generate(prompt: list[int] | None = None, **changes: Any) -> list[int]:
    return answer_alone(lane(), prompt or [5, 6, 7], params(**changes)).token_ids


def test_a_request_without_rules_costs_nothing() -> None:
    plain = lane()
    plain.add("a", [5, 6], params())
    assert spec_of(plain).edits is None
    assert LogitsProcessor.of(params(), [5, 6]) is None


def test_frequency_penalty_spreads_an_answer_and_a_negative_one_makes_it_repeat() -> None:
    def distinct(**changes: Any) -> int:
        return sum(len(set(generate([seed, 9], seed=seed, temperature=2.0, **changes))) for seed in range(8))

    assert distinct(frequency_penalty=2.0) > distinct() + 20 > distinct(frequency_penalty=-2.0) + 40


def test_presence_penalty_spreads_an_answer() -> None:
    def distinct(**changes: Any) -> int:
        return sum(len(set(generate([seed, 9], seed=seed, temperature=2.0, **changes))) for seed in range(8))

    assert distinct(presence_penalty=2.0) > distinct() + 15


def test_penalties_count_the_answer_and_repetition_also_the_prompt() -> None:
    rules = LogitsProcessor.of(params(repetition_penalty=1.2, frequency_penalty=0.5), [7, 7, 3])
    assert rules is not None
    output = [4, 9, 4]
    edits = rules.adjustments(output, [])
    assert edits.prompt_ids == ints(3, 7)
    counts = Counter(output)
    assert edits.output_ids == ints(*counts) and edits.output_counts == ints(*counts.values())
    assert rules.adjustments([4], []).output_counts == ints(1), "asked again for a shorter answer"
    assert rules.adjustments(output, []) == edits


def test_frequency_penalty_does_not_count_the_prompt() -> None:
    rules = LogitsProcessor.of(params(frequency_penalty=0.5), [7, 7, 3])
    assert rules is not None
    assert rules.adjustments([], []).output_ids == rules.adjustments([], []).prompt_ids == b""


def test_only_allowed_token_ids_come() -> None:
    assert set(generate(allowed_token_ids=[8, 30, 59], temperature=5.0)) == {8, 30, 59}


def test_a_strong_bias_forces_a_token_and_a_strong_negative_one_bans_it() -> None:
    assert set(generate(logit_bias={17: 100})) == {17}
    banned = dict.fromkeys(range(50), -100.0)
    assert set(generate(logit_bias=banned, temperature=3.0)) <= set(range(50, 60))


def test_a_bad_word_of_one_token_never_comes() -> None:
    usual = generate(temperature=0.0)
    banned = generate(temperature=0.0, bad_words_token_ids=((usual[0],),))
    assert usual[0] not in banned


def test_only_the_last_token_of_a_bad_word_is_banned_and_only_after_the_others() -> None:
    usual = generate(temperature=0.0)
    first, second = usual[3:5]
    changed = generate(temperature=0.0, bad_words_token_ids=((first, second),))
    assert changed[:4] == usual[:4]
    assert (first, second) not in set(zip(changed, changed[1:], strict=False))


def test_bad_words_look_at_the_answer_only() -> None:
    usual = generate([5, 6, 7], temperature=0.0)
    assert generate([5, 6, 7], temperature=0.0, bad_words_token_ids=((7, usual[0]),)) == usual


def test_min_tokens_holds_back_eos_under_a_mask() -> None:
    changes: dict[str, Any] = {"allowed_token_ids": [EOS, 4], "ignore_eos": False, "logit_bias": {EOS: 100}}
    assert generate(min_tokens=6, **changes) == [4] * 6 + [EOS]
    assert generate(min_tokens=0, **changes) == [EOS]


def test_a_ban_that_leaves_nothing_does_not_count() -> None:
    assert generate(allowed_token_ids=[EOS], min_tokens=3, ignore_eos=False) == [EOS]


RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"logit_bias": {4: 3.0, 5: -2.0}, "frequency_penalty": -0.2},
    {"allowed_token_ids": list(range(0, 60, 3)), "repetition_penalty": 0.8},
    {"bad_words_token_ids": ((4,), (8, 9)), "min_tokens": 9, "ignore_eos": False},
    {},
]


def mixed(i: int) -> tuple[list[int], SamplingParams]:
    prompt = random.Random(i).choices(range(2, VOCAB_SIZE), k=1 + i % 13)
    changes = {"temperature": [0.0, 0.7, 1.0, 1.5][i % 4], "top_p": [1.0, 0.9][i % 2], "seed": 100 + i}
    return prompt, params(max_tokens=30, **(changes | RULES[i % len(RULES)]))


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return [answer_alone(lane(), *mixed(i)).token_ids for i in range(32)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 30},
        {"num_blocks": 30, "enable_prefix_caching": False, "max_num_batched_tokens": 9},
    ],
    ids=["batch of 32", "chunked prompts", "preempted", "preempted, chunked, no cache"],
)
def test_an_answer_is_the_same_alone_and_in_any_company(changes: dict[str, Any], alone: list[list[int]]) -> None:
    crowd = lane(**changes)
    for i in range(32):
        crowd.add(str(i), *mixed(i))
    answers = crowd.run()
    assert [answers[str(i)].token_ids for i in range(32)] == alone
    assert (crowd.scheduler.stats().num_preemptions > 0) == ("num_blocks" in changes)


def test_an_answer_is_the_same_after_the_lane_lost_its_cache(alone: list[list[int]]) -> None:
    crowd = lane()
    for i in range(32):
        crowd.add(str(i), *mixed(i))
    answers = crowd.run(lambda step: crowd.scheduler.preempt_all() if step % 5 == 4 else None)
    assert [answers[str(i)].token_ids for i in range(32)] == alone


def test_logprobs_come_with_every_token_of_whoever_asked() -> None:
    crowd = lane()
    crowd.add("asks", [5, 6, 7], params(logprobs=2, frequency_penalty=1.0))
    crowd.add("does not", [5, 6, 7], params())
    answers = crowd.run()
    report = answers["asks"].logprobs
    assert [entry.token_id for entry in report] == answers["asks"].token_ids
    assert all(len(entry.top_ids) == 2 for entry in report)
    assert answers["does not"].logprobs == []


@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 5}], ids=["at once", "chunked"])
@pytest.mark.parametrize("disturbed", [False, True])
def test_prompt_logprobs_cover_the_prompt_once(changes: dict[str, Any], disturbed: bool) -> None:
    prompt = random.Random(4).choices(range(VOCAB_SIZE), k=23)
    some = lane(**changes)
    some.add("warms the cache", prompt, params(max_tokens=1))
    some.run()
    some.add("asks", prompt, params(prompt_logprobs=1))
    answer = some.run(lambda step: some.scheduler.preempt_all() if disturbed and step in (2, 9) else None)["asks"]
    assert answer.prompt_logprobs is not None
    assert [entry.token_id for entry in answer.prompt_logprobs] == prompt[1:]
    calm = answer_alone(lane(), prompt, params(prompt_logprobs=1))
    assert answer.prompt_logprobs == calm.prompt_logprobs


def test_prompt_logprobs_of_a_prompt_of_one_token_are_none_at_all() -> None:
    assert answer_alone(lane(), [5], params(prompt_logprobs=1)).prompt_logprobs == []


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("logit_bias", {-1: 1.0}),
        ("allowed_token_ids", []),
        ("bad_words", [""]),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})


def test_what_scripts_for_vllm_pass_is_understood() -> None:
    written = SamplingParams(stop="\n", stop_token_ids=None, bad_words=None, logit_bias=None, allowed_token_ids=[3])  # type: ignore[arg-type]
    assert (written.stop, written.stop_token_ids, written.bad_words) == (("\n",), (), ())
    assert (written.logit_bias, written.allowed_token_ids) == ({}, (3,))
    assert SamplingParams(logit_bias={1: 1000.0}).logit_bias == {1: 100.0}

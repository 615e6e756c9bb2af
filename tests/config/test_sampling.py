"""Every sampling parameter has a range, and an error that names it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import msgspec
import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams, StructuredOutputsParams


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", math.nan),
        ("min_p", math.nan),
        ("presence_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("logit_bias", {3: math.nan}),
    ],
)
def test_what_is_no_number_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})


def test_an_infinite_bias_is_cut_like_a_large_one() -> None:
    assert SamplingParams(logit_bias={3: math.inf, 4: -math.inf}).logit_bias == {3: 100.0, 4: -100.0}


RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 128], [0, 129, True, 1.0, "1", None]),
    "max_tokens": ([1, 2**31 - 1, None], [0, 2**31, 1.5]),
    "min_tokens": ([0, 16], [-1, 17, 2**64, None]),
    "temperature": ([0, 1e-300, 100], [-1e-9, 100.1, -math.inf, 2**2000, "1", None, True]),
    "top_p": ([5e-324, 1, 1.0], [0, 0.0, 1.1, -math.inf, None]),
    "top_k": ([-1, 0, 2**31 - 1], [-2, 2**31, 2**64, 2**70, 1.0]),
    "min_p": ([0, 1], [-0.1, 1.1, []]),
    "seed": ([None, -(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 1.0]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1, None]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1, "0"]),
    "repetition_penalty": ([0.01, 100], [0, 1e-300, 0.009, 100.1, 1e300, -1]),
    "logit_bias": ([None, {}, {0: 1e308, 2**31 - 1: -1}], [{-1: 0}, {2**31: 0}, {"3": 0}, {3: "x"}, {3: True}, [3]]),
    "stop": ([None, "a", ["a"] * 64, " ", "x" * 1024], ["", ["a"] * 65, "x" * 1025, [5], [b"a"], 5, {"a"}]),
    "stop_token_ids": ([None, [0, 2**31 - 1]], [[-1], [2**31], ["a"], [1.0], [True], "a", 5]),
    "allowed_token_ids": ([None, [0, 2**31 - 1]], [[], [-1], [2**31], [None], "a", 5]),
    "logprob_token_ids": ([None, [0, 2**31 - 1]], [[], [-1], [2**31], [None], "a", 5]),
    "bad_words": ([None, ["a"] * 1024], [[""], [" "], ["a"] * 1025, ["x" * 1025], [5], 5]),
    "bad_words_token_ids": ([((0, 2**31 - 1),)], [((),), ((-1,),), ((2**31,),), (3,), 3, (("a",),)]),
    "logprobs": ([None, -1, 2**31 - 1], [-2, 2**31, 1.0, True]),
    "prompt_logprobs": ([None, -1, 2**31 - 1], [-2, 2**31]),
    "ignore_eos": ([True], [1, None, "true"]),
    "skip_special_tokens": ([False], [0]),
    "include_stop_str_in_output": ([True], ["x"]),
    "detokenize": ([False], [0, None]),
    "structured_outputs": ([None, StructuredOutputsParams(regex="a")], [{"regex": "a"}, "a"]),
    "structured_outputs_after": ([None, (None, "</think>"), (7, "end")], ["</think>", (1.5, "x"), (1, 2), ()]),
    "pooling": ([None], ["mean"]),
}


@pytest.mark.parametrize("field", RANGES)
def test_a_parameter_means_something_within_its_range_and_is_refused_beyond(field: str) -> None:
    inside, outside = RANGES[field]
    for value in inside:
        SamplingParams(**{field: value})
    for value in outside:
        with pytest.raises(ConfigError, match=f"^{field}="):
            SamplingParams(**{field: value})


def test_every_parameter_has_a_range() -> None:
    assert set(RANGES) == set(SamplingParams.__struct_fields__)


def test_what_is_accepted_can_be_sent() -> None:
    for field, (inside, _) in RANGES.items():
        for value in inside:
            params = SamplingParams(**{field: value})
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    "form",
    [
        {"json": 5},
        {"regex": b"a"},
        {"grammar": ["a"]},
        {"json_object": 1},
        {"choice": [5]},
        {"choice": "abc"},
        {"choice": ["a"] * 10_001},
    ],
)
def test_a_form_of_the_wrong_type_is_refused(form: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^structured_outputs\.{next(iter(form))}="):
        StructuredOutputsParams(**form)


def test_parameters_may_be_changed_and_are_checked_when_they_are_used() -> None:
    params = SamplingParams(temperature=0.5, logit_bias={3: 1.0})
    params.temperature, params.max_tokens, params.stop = 0.0, None, ["a"]  # type: ignore[assignment]
    used = params.clone()
    assert (used.temperature, used.max_tokens, used.stop) == (0.0, 2**31 - 1, ("a",))
    used.logit_bias[4] = 1.0
    assert params.logit_bias == {3: 1.0}, "a copy shares nothing that can change"
    params.top_p = 1.5
    with pytest.raises(ConfigError, match=r"^top_p=1.5: must be a number within \[0, 1\]"):
        params.clone()


def test_none_is_the_default_of_from_optional() -> None:
    empty = SamplingParams.from_optional(n=None, temperature=None, top_p=None, repetition_penalty=None, stop=None)
    assert empty == SamplingParams()
    params = SamplingParams.from_optional(2, temperature=0.5, logit_bias={"7": 200.0}, max_tokens=None)
    assert params == SamplingParams(n=2, temperature=0.5, logit_bias={7: 100.0}, max_tokens=2**31 - 1)
    with pytest.raises(ConfigError, match="logit_bias"):
        SamplingParams.from_optional(logit_bias={"seven": 1.0})


def test_vllms_parameters_are_taken_by_position_and_by_older_names() -> None:
    form = StructuredOutputsParams(regex="a")
    assert SamplingParams(2, 0.5, guided_decoding=form) == SamplingParams(
        n=2, presence_penalty=0.5, structured_outputs=form
    )
    with pytest.raises(TypeError, match="several values for n"):
        SamplingParams(2, n=2)


def test_parameters_without_a_meaning_here_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert SamplingParams(spaces_between_special_tokens=False, best_of=1, skip_clone=True) == SamplingParams()
    assert [record.getMessage() for record in caplog.records] == [
        "spaces_between_special_tokens=False has no effect here"
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"best_of": 3}, "best_of=3: is a sampling parameter of vLLM that does not exist here"),
        ({"repetition_detection": {"min_count": 2}}, "repetition_detection"),
        ({"temprature": 1}, "temprature=1: is not a sampling parameter; did you mean 'temperature'?"),
        ({"stop": ["a"], "detokenize": False}, "detokenize=False: must be true"),
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said.replace('?', '[?]')}"):
        SamplingParams(**given)


def test_parameters_survive_pickling() -> None:
    params = SamplingParams(n=2, logit_bias={3: 1.0}, structured_outputs=StructuredOutputsParams(regex="a"))
    assert pickle.loads(pickle.dumps(params)) == params == copy.deepcopy(params)

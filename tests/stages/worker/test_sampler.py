"""What each sampling parameter means, shown on many draws with fixed seeds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.toy_lane import ints
from torch import Tensor

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.sequence import Sequence
from stagemesh.stages.messages.step import NOT_FINITE, NOTHING_ALLOWED, LogitsAdjustments, SampleSpec
from stagemesh.stages.worker.sampler import LEAST_LOGPROB, sample, token_logprobs, uniform

NUM_DRAWS = 4000
PROBABILITIES = torch.tensor([0.05, 0.4, 0.02, 0.25, 0.08, 0.2])
LOGITS = PROBABILITIES.log()


def spec(**changes: Any) -> SampleSpec:
    settings = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 1,
        "position": 0,
        "banned_token_ids": [],
    }
    return SampleSpec(**{**settings, **changes})


def draw(logits: Tensor = LOGITS, num_draws: int = NUM_DRAWS, **changes: Any) -> list[int]:
    """Tokens at positions 0, 1, … of one sequence whose logits stay the same."""
    specs = [spec(position=i, **changes) for i in range(num_draws)]
    return sample(logits.repeat(num_draws, 1), specs)


def frequencies(tokens: list[int], size: int = len(PROBABILITIES)) -> Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=size) / len(tokens)


def assert_distributed(tokens: list[int], expected: Tensor) -> None:
    """Chi-squared over the tokens that can occur: beyond 5 sigma of its mean for at most 5 degrees of
    freedom.
    """
    expected = expected / expected.sum()
    observed = frequencies(tokens, len(expected))
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = len(tokens) * ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = int(possible.sum()) - 1
    assert chi2 < degrees + 5 * math.sqrt(2 * max(degrees, 1))


def test_plain_sampling_follows_the_softmax() -> None:
    assert_distributed(draw(), PROBABILITIES)


def test_another_seed_gives_other_tokens_of_the_same_distribution() -> None:
    first, second = draw(seed=2), draw(seed=3)
    assert first != second
    assert_distributed(second, PROBABILITIES)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_temperature_sharpens_or_flattens(temperature: float) -> None:
    assert_distributed(draw(temperature=temperature), PROBABILITIES ** (1 / temperature))


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert set(draw(LOGITS * 50, num_draws=20, temperature=1e-30)) == {1}


def test_temperature_0_takes_the_likeliest_token_and_the_lowest_id_of_a_tie() -> None:
    assert set(draw(num_draws=10, temperature=0.0)) == {1}
    assert sample(torch.tensor([[0.0, 2.0, 2.0]]), [spec(temperature=0.0)]) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_last_token_when_it_is_the_likeliest(dtype: torch.dtype) -> None:
    logits = torch.arange(100.0)[None].to(dtype)
    assert sample(logits, [spec(temperature=0.0)]) == [99]


@pytest.mark.parametrize(
    "top_k, kept", [(1, [1]), (2, [1, 3]), (4, [1, 3, 4, 5]), (6, range(6)), (99, range(6)), (-1, range(6))]
)
def test_top_k_keeps_the_k_likeliest(top_k: int, kept: list[int]) -> None:
    expected = torch.zeros(6)
    expected[list(kept)] = PROBABILITIES[list(kept)]
    assert_distributed(draw(top_k=top_k), expected)


@pytest.mark.parametrize(
    "top_p, kept", [(0.01, [1]), (0.4, [1]), (0.5, [1, 3]), (0.84, [1, 3, 5]), (0.86, [1, 3, 4, 5])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(6)
    expected[kept] = PROBABILITIES[kept]
    # A hair above 0.4, so that the sum of float32 logits cannot fall below it.
    logits = LOGITS.clone()
    logits[1] += 1e-5
    assert_distributed(draw(logits, top_p=top_p), expected)


@pytest.mark.parametrize("min_p, kept", [(0.1, [0, 1, 3, 4, 5]), (0.45, [1, 3, 5]), (0.6, [1, 3]), (1.0, [1])])
def test_min_p_keeps_tokens_near_the_likeliest(min_p: float, kept: list[int]) -> None:
    expected = torch.zeros(6)
    expected[kept] = PROBABILITIES[kept]
    assert_distributed(draw(min_p=min_p), expected)


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    # Of 0.4, 0.25, 0.2 (sum 0.85) the first two make 0.76, so 0.75 keeps two; of the whole they make only
    # 0.65.
    expected = torch.tensor([0, 0.4, 0, 0.25, 0, 0])
    assert_distributed(draw(top_k=3, top_p=0.75), expected)


def test_a_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    flat = torch.zeros(3000)
    flat[0] = 1e-3  # one token a little ahead, 2999 alike: ties with the threshold are kept
    tokens = draw(flat, num_draws=500, top_p=0.9)
    assert max(tokens) > 2500


def test_banned_tokens_never_come() -> None:
    expected = PROBABILITIES.clone()
    expected[[1, 3]] = 0
    assert_distributed(draw(banned_token_ids=[1, 3]), expected)
    assert set(draw(num_draws=5, temperature=0.0, banned_token_ids=[1])) == {3}


def test_a_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 5000, generator=generator) * 3
    specs = [
        spec(
            temperature=[0.0, 0.5, 1.0, 1.3][i % 4],
            top_p=[1.0, 0.9, 0.5][i % 3],
            top_k=[0, 40, 1000, 5, 0][i % 5],
            min_p=[0.0, 0.02][i % 2],
            seed=i * 977,
            position=i,
            banned_token_ids=[i, i + 1] if i % 7 == 0 else [],
        )
        for i in range(32)
    ]
    together = sample(logits.clone(), specs)

    alone = [sample(logits[i : i + 1].clone(), [specs[i]])[0] for i in range(32)]
    backwards = sample(logits.flip(0).clone(), specs[::-1])[::-1]

    assert alone == together == backwards


def test_the_same_seed_and_position_always_give_the_same_token() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    first = [sample(logits.clone(), [spec(seed=5, position=p)])[0] for p in range(50)]
    again = [sample(logits.clone(), [spec(seed=5, position=p)])[0] for p in reversed(range(50))]
    assert first == again[::-1]
    assert len(set(first)) > 25


def test_uniform_is_even_and_independent_over_positions_and_seeds() -> None:
    by_position = torch.tensor([uniform(42, p) for p in range(NUM_DRAWS)], dtype=torch.float64)
    by_seed = torch.tensor([uniform(s, 42) for s in range(NUM_DRAWS)], dtype=torch.float64)
    for numbers in (by_position, by_seed):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = torch.histc(numbers, 20, 0, 1)
        chi2 = ((counts - NUM_DRAWS / 20) ** 2 / (NUM_DRAWS / 20)).sum()
        assert chi2 < 19 + 5 * math.sqrt(2 * 19)
        correlation = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(NUM_DRAWS)
    # Neighbouring seeds must not be the same stream, shifted.
    shifted = [uniform(43, p) for p in range(100)]
    assert not set(shifted) & {uniform(42, p) for p in range(200)}


def test_uniform_takes_seeds_of_64_bits_and_negative_ones() -> None:
    assert uniform(2**64 - 1, 0) == uniform(-1, 0)
    assert uniform(2**63, 0) != uniform(0, 0)


def test_a_number_that_rounds_up_to_the_total_still_finds_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagemesh.stages.worker.sampler.uniform", lambda seed, position: 1 - 2**-53)
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert sample(logits, [spec()]) == [1]
    monkeypatch.setattr("stagemesh.stages.worker.sampler.uniform", lambda seed, position: 0.0)
    assert sample(torch.tensor([[-math.inf, 0.0, 0.0]]), [spec()]) == [1]


def test_a_bias_is_added_to_the_logits() -> None:
    bias = torch.tensor([1.5, -100.0, 0.5])
    change = LogitsAdjustments(bias_ids=ints(0, 1, 4), bias=bias.numpy().tobytes())
    expected = PROBABILITIES.clone()
    expected[[0, 1, 4]] *= bias.exp()
    expected[1] = 0  # e^-100 never comes
    assert_distributed(draw(edits=change), expected)


def test_only_allowed_tokens_come_and_keep_their_odds() -> None:
    expected = PROBABILITIES.clone()
    expected[[0, 1, 3, 5]] = 0
    assert_distributed(draw(edits=LogitsAdjustments(allowed=bytes([0b010100]))), expected)


def test_tokens_past_the_end_of_the_mask_are_not_allowed() -> None:
    tokens = draw(torch.zeros(20), num_draws=200, edits=LogitsAdjustments(allowed=b"\xff"))
    assert set(tokens) == set(range(8))


def test_presence_penalty_counts_a_token_once_however_often_it_came() -> None:
    change = LogitsAdjustments(presence_penalty=0.7, output_ids=ints(1, 4), output_counts=ints(9, 1))
    expected = PROBABILITIES.clone()
    expected[[1, 4]] *= math.exp(-0.7)
    assert_distributed(draw(edits=change), expected)


def test_frequency_penalty_counts_every_time_that_a_token_came() -> None:
    change = LogitsAdjustments(frequency_penalty=0.4, output_ids=ints(1, 4), output_counts=ints(3, 1))
    expected = PROBABILITIES.clone()
    expected[1] *= math.exp(-1.2)
    expected[4] *= math.exp(-0.4)
    assert_distributed(draw(edits=change), expected)


def test_a_negative_penalty_makes_repetition_likelier() -> None:
    change = LogitsAdjustments(
        presence_penalty=-0.5, frequency_penalty=-0.25, output_ids=ints(2), output_counts=ints(2)
    )
    expected = PROBABILITIES.clone()
    expected[2] *= math.exp(1.0)
    assert_distributed(draw(edits=change), expected)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    logits = torch.tensor([1.2, 0.8, -0.4, 0.3, -0.9, 0.0])
    change = LogitsAdjustments(
        repetition_penalty=2.0, prompt_ids=ints(0, 2), output_ids=ints(2, 3), output_counts=ints(7, 1)
    )
    expected = torch.tensor([0.6, 0.8, -0.8, 0.15, -0.9, 0.0]).exp()
    assert_distributed(draw(logits, edits=change), expected)


def test_edits_come_before_temperature_and_before_the_limits() -> None:
    change = LogitsAdjustments(bias_ids=ints(2), bias=torch.tensor([5.0]).numpy().tobytes())
    expected = PROBABILITIES.clone()
    expected[2] *= math.exp(5.0)
    expected = expected**2
    expected[expected < expected.sort().values[-2]] = 0
    assert_distributed(draw(edits=change, temperature=0.5, top_k=2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_of_one_row_leave_the_others_alone(dtype: torch.dtype) -> None:
    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain = [spec(seed=i, position=i) for i in range(16)]
    change = LogitsAdjustments(repetition_penalty=1.3, prompt_ids=ints(*range(200)), allowed=b"\xf0" * 50)
    mixed = [spec(seed=i, position=i, edits=change if i % 3 == 0 else None) for i in range(16)]

    without, together = sample(logits.clone(), plain), sample(logits.clone(), mixed)
    alone = [sample(logits[i : i + 1].clone(), [mixed[i]])[0] for i in range(16)]

    assert together == alone
    assert [t for i, t in enumerate(together) if i % 3] == [t for i, t in enumerate(without) if i % 3]


BAD_ROWS = {
    "NaN": [math.nan, 1.0, 2.0, 0.0, 0.0, 0.0],
    "+inf": [0.0, 1.0, math.inf, 0.0, 0.0, 0.0],
    "nothing allowed": [-math.inf] * 6,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_sampled_is_said_and_disturbs_no_other(
    row: list[float], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    healthy = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    specs = [spec(position=i, **(settings if i % 2 else {})) for i in range(8)]
    expected = sample(healthy.clone(), specs)
    mixed = torch.cat((healthy[:4], torch.tensor([row], dtype=dtype), healthy[4:]))
    said = NOTHING_ALLOWED if max(row) == -math.inf else NOT_FINITE
    assert sample(mixed, [*specs[:4], spec(**settings), *specs[4:]]) == [*expected[:4], said, *expected[4:]]


def test_what_a_row_may_not_choose_does_not_spoil_it() -> None:
    logits = torch.tensor([[math.nan, 1.0, math.inf, 0.0]])
    for limit in ({"banned_token_ids": [0, 2]}, {"edits": LogitsAdjustments(allowed=b"\x0a")}):
        assert sample(logits.clone(), [spec(temperature=0.0, **limit)]) == [1]
    assert sample(LOGITS[None].clone(), [spec(banned_token_ids=list(range(6)))]) == [NOTHING_ALLOWED]


def test_ids_outside_of_the_vocabulary_change_nothing() -> None:
    far = ints(-1, 6, 2**31 - 1)
    bias = torch.full((3,), 50.0).numpy().tobytes()
    edits = LogitsAdjustments(
        bias_ids=far,
        bias=bias,
        repetition_penalty=2.0,
        presence_penalty=2.0,
        prompt_ids=far,
        output_ids=far,
        output_counts=ints(1, 1, 1),
    )
    strange = spec(temperature=0.0, banned_token_ids=[-1, 6, 2**40], edits=edits)
    # The last id is the likeliest: a ban of -1 must not reach it.
    assert sample(LOGITS.roll(-2)[None].clone(), [strange]) == [5]


EDGES: dict[str, list[Any]] = {
    "temperature": [0.0, 5e-324, 1e-300, 1e-45, 1e-5, 100.0],
    "top_p": [5e-324, 1e-300, 1e-9, math.nextafter(1.0, 0.0), 1.0],
    "top_k": [-1, 0, 1, 2**31 - 1, 2**31, 2**64],
    "min_p": [0.0, 5e-324, 1e-300, 1.0],
    "repetition_penalty": [5e-324, 1e-300, 1e-38, 0.01, 100.0, 1e38, 1.7e308],
    "frequency_penalty": [-2.0, -5e-324, 5e-324, 2.0],
    "presence_penalty": [-2.0, -5e-324, 5e-324, 2.0],
    "logit_bias": [{0: -math.inf}, {0: math.inf, 3: 5e-324}, dict.fromkeys(range(40), -1e308), {2**31 - 1: 100.0}],
    "min_tokens": [0, 1, 2**31 - 1, 2**31],
    "max_tokens": [1, 2**31 - 1, 2**63],
    "seed": [0, -(2**63), 2**63, 2**64 - 1, 2**64],
    "bad_words_token_ids": [((),), ((3,),), ((2**31 - 1,), (0,))],
    "allowed_token_ids": [[0], [39], list(range(40))],
    "ignore_eos": [True],
}


def edge_pairs() -> list[dict[str, Any]]:
    singles = [(name, value) for name, values in EDGES.items() for value in values]
    return [{a[0]: a[1], b[0]: b[1]} for a, b in itertools.combinations_with_replacement(singles, 2)]


def test_parameters_at_the_edges_of_their_types_are_refused_or_sampled_singly_and_in_pairs() -> None:
    """Through everything that a leader makes of them, for tame logits and for very large ones."""
    prompt, output = [1, 2, 3, 3], [5, 3, 3]
    random_logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 4
    extreme = torch.where(random_logits > 0, 1e36, -1e36)
    num_sampled = 0
    for pair in edge_pairs():
        try:
            params = SamplingParams(**{"seed": 1, "max_tokens": 2**31 - 1, **pair})
        except ConfigError as error:
            assert error.field in pair
            continue
        sequence = Sequence(0, "id", prompt, params, eos_token_ids=[0, 50, -1], max_model_len=100)
        sequence.token_ids.extend(output)
        num_sampled += 1
        for logits in (random_logits, extreme):
            (token_id,) = sample(logits[None].clone(), [sequence.sample_spec(sequence.num_tokens)])
            assert 0 <= token_id < 40, pair
    assert num_sampled > 500


def test_logprobs_are_those_of_the_model_with_rank_and_likeliest_tokens() -> None:
    chosen, likeliest, everything = token_logprobs(LOGITS.repeat(3, 1) + 7.0, [4, 1, 2], [2, 0, -1])
    assert chosen and likeliest and everything
    assert chosen.logprob == pytest.approx(math.log(0.08), abs=1e-6) and chosen.rank == 4
    assert chosen.top_ids == [1, 3]
    assert chosen.top_logprobs == pytest.approx([math.log(0.4), math.log(0.25)], abs=1e-6)
    assert likeliest.rank == 1 and likeliest.top_ids == [] and likeliest.top_logprobs == []
    assert everything.rank == 6 and everything.top_ids == [1, 3, 5, 4, 0, 2]


def test_named_tokens_are_reported_with_the_chosen_one_in_place_of_the_likeliest() -> None:
    named, likeliest = token_logprobs(LOGITS.repeat(2, 1), [4, 4], [2, 2], [[0, 3], []])
    assert named and likeliest and (named.token_id, named.rank) == (4, 4)
    assert named.top_ids == [3, 4, 0] and likeliest.top_ids == [1, 3]
    assert named.top_logprobs[0] == pytest.approx(math.log(0.25), abs=1e-6)


def test_logprobs_are_finite_and_left_out_for_a_row_that_was_not_sampled() -> None:
    logits = torch.tensor([[0.0, -math.inf], [math.nan, 1.0], [math.inf, 1.0], [math.nan] * 2])
    excluded, no_number, infinite, nothing = token_logprobs(logits, [1, 1, 0, -1], [-1] * 4)
    assert nothing is None and excluded and no_number and infinite
    assert excluded.logprob == LEAST_LOGPROB and excluded.rank == 2
    assert excluded.top_logprobs == [0.0, LEAST_LOGPROB]
    for entry in (no_number, infinite):
        assert all(math.isfinite(value) for value in (entry.logprob, *entry.top_logprobs))

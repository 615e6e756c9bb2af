"""Sampling parameters that are numbers in form only."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams


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

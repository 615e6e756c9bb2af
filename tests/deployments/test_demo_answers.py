"""The demo model in this process: what must stay true of its answers whatever happens to them on the way."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.harness import DEMO, held_out
from support.schemas import assert_valid, random_schema

from stagemesh import LLM, SamplingParams
from stagemesh.config.sampling import StructuredOutputsParams

NUM_SCHEMAS = 200
COMPANY = 31
SMALL_CACHE = "9MiB"
"""72 blocks of 16 tokens: far fewer than 32 answers need, and enough for one of max_model_len."""


def load(**args: Any) -> LLM:
    settings = {"dtype": "float32", "device": "cpu", "max_model_len": 768, "max_num_seqs": 32, **args}
    return LLM(str(DEMO), **{"kv_cache_memory_bytes": "128MiB", **settings})


def preemptions(llm: LLM) -> int:
    return llm._lane.engine.stats().result(timeout=30).num_preemptions


def question() -> str:
    """A look-up of a few hundred tokens, so that its prompt has several chunks and several blocks."""
    return held_out("lookup", 2, seed=3)[1].prompt[:1200]


@pytest.fixture(scope="module")
def alone() -> list[int]:
    with load() as llm:
        return sampled(llm, [7])[0]


def sampled(llm: LLM, seeds: list[int]) -> list[list[int]]:
    """One prompt, drawn from with each seed: high temperature, so that any change of a number would show."""
    params = [SamplingParams(temperature=1.2, seed=seed, max_tokens=48, ignore_eos=True) for seed in seeds]
    prompts = [question() if seed == 7 else f"{seed} kings and {question()[:seed]}" for seed in seeds]
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("args", "is_preempted"),
    [
        ({}, False),
        ({"kv_cache_memory_bytes": SMALL_CACHE}, True),
        ({"max_num_batched_tokens": 48}, False),
        ({"enable_prefix_caching": False, "block_size": 32}, False),
    ],
    ids=["in a batch of 32", "preempted", "after chunk boundaries", "other blocks, no cache"],
)
def test_a_seeded_answer_is_always_the_same(alone: list[int], args: dict[str, Any], is_preempted: bool) -> None:
    with load(**args) as llm:
        company = sampled(llm, [*range(100, 100 + COMPANY), 7])
        assert (preemptions(llm) > 0) == is_preempted
    assert company[-1] == alone
    assert len({tuple(answer) for answer in company}) > COMPANY // 2, "different seeds should differ"


@pytest.mark.parametrize("cache", ["128MiB", "1600KiB"], ids=["calm", "preempted"])
def test_answers_of_the_demo_model_to_random_schemas_always_validate(cache: str) -> None:
    chooser = random.Random(7)
    schemas = [random_schema(chooser) for _ in range(NUM_SCHEMAS)]
    params = [
        SamplingParams(
            temperature=[0.0, 1.0, 3.0][i % 3],
            seed=i,
            max_tokens=170,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        for i, schema in enumerate(schemas)
    ]
    with load(kv_cache_memory_bytes=cache, max_model_len=192, block_size=1, max_num_seqs=64) as llm:
        answers = llm.generate([f"Say it, player {i}: " for i in range(NUM_SCHEMAS)], params, use_tqdm=False)
        assert preemptions(llm) == 0 if cache == "128MiB" else preemptions(llm) > 25
    for answer, schema in zip(answers, schemas, strict=True):
        assert answer.outputs[0].finish_reason == "stop"
        assert_valid(answer.outputs[0].text, schema)

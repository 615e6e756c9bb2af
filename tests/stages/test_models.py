"""Logits of our models against transformers, float32, over every way in which a sequence can be computed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import Part, ThreadLane, make_checkpoint, reference_logits
from torch import Tensor

TOLERANCE = 1e-4
BLOCK = 4

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"head_dim": 20},
    "llama-rope-llama3": {"rope_parameters": LLAMA3},
    "llama-rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "llama-no-gqa": {"num_key_value_heads": 8},
    "llama-odd-vocab": {"vocab_size": 101, "tie_word_embeddings": True},
    "llama-3-kv-heads": {
        "hidden_size": 60,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
    },
    "qwen3": {"family": "Qwen3"},
    "qwen3-all": {
        "family": "Qwen3",
        "head_dim": 12,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "vocab_size": 101,
        "rope_parameters": LLAMA3,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), **CHECKPOINTS[name])
        return made[name]

    return get


def tokens(count: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(101) for _ in range(count)]


def blocks(count: int, seed: int) -> list[int]:
    """Distinct block ids in no order."""
    return random.Random(seed).sample(range(64), count)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_agree_with_transformers_in_prefill_chunks_and_decode(checkpoint: Any, name: str) -> None:
    folder = checkpoint(name)
    lane, ids, table = ThreadLane(folder), tokens(45, seed=1), blocks(12, seed=2)
    expected = reference_logits(folder, ids)

    assert_close(lane.logits(Part(ids, 0, table)), expected)

    other = blocks(12, seed=3)
    start = 0
    for length in (
        7,
        1,
        20,
        8,
        1,
        1,
        7,
    ):  # chunks that end inside a block, on its edge, and decode steps between
        ours = lane.logits(Part(ids[start : start + length], start, other))
        assert_close(ours, expected[start : start + length])
        start += length


@pytest.mark.parametrize("name", ["llama", "qwen3-all"])
@pytest.mark.parametrize("tp, partition", [(1, None), (2, None), (4, None), (1, (1, 2)), (2, (1, 1, 1)), (4, (2, 1))])
def test_every_layout_gives_the_logits_of_transformers(
    checkpoint: Any, name: str, tp: int, partition: tuple[int, ...] | None
) -> None:
    folder = checkpoint(name)
    lane = ThreadLane(folder, tp=tp, partition=partition)
    first, second = tokens(30, seed=4), tokens(21, seed=5)
    expected_first, expected_second = reference_logits(folder, first), reference_logits(folder, second)
    a, b = blocks(16, seed=6)[:8], blocks(16, seed=6)[8:]

    assert_close(lane.logits(Part(first[:17], 0, a)), expected_first[:17])
    ours = lane.logits(Part(first[17:29], 17, a), Part(second[:20], 0, b))
    assert_close(ours, torch.cat((expected_first[17:29], expected_second[:20])))
    ours = lane.logits(Part(first[29:], 29, a), Part(second[20:], 20, b))
    assert_close(ours, torch.cat((expected_first[29:], expected_second[20:])))
    assert lane.sample(Part(first[29:], 29, a), Part(second[20:], 20, b)) == [
        int(expected_first[-1].argmax()),
        int(expected_second[-1].argmax()),
    ]


@pytest.mark.parametrize(
    "name, tp", [("llama-tied", 2), ("llama-odd-vocab", 4), ("llama-biases", 2), ("llama-3-kv-heads", 3)]
)
def test_awkward_sizes_are_cut_without_a_trace(checkpoint: Any, name: str, tp: int) -> None:
    folder = checkpoint(name)
    ids = tokens(20, seed=8)
    for partition in (None, (2, 1)):
        lane = ThreadLane(folder, tp=tp, partition=partition)
        assert_close(lane.logits(Part(ids, 0, blocks(5, seed=9))), reference_logits(folder, ids))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_prefix_computed_for_another_sequence_gives_the_same_logits(checkpoint: Any, name: str) -> None:
    folder = checkpoint(name)
    lane = ThreadLane(folder)
    prefix, first, second = tokens(16, seed=10), tokens(5, seed=11), tokens(9, seed=12)
    table = blocks(12, seed=13)
    shared, own, others = table[:4], table[4:8], table[8:]
    lane.logits(Part(prefix + first, 0, shared + own))

    ours = lane.logits(Part(second, len(prefix), shared + others))

    assert_close(ours, reference_logits(folder, prefix + second)[16:])


def test_a_mixed_batch_gives_each_sequence_its_own_logits(checkpoint: Any) -> None:
    """Decodes of very different lengths around prefill chunks with and without context, in no order."""
    folder = checkpoint("llama")
    lane = ThreadLane(folder, num_blocks=128)
    free = random.Random(14).sample(range(128), 128)
    lengths = [3, 60, 1, 25, 58, 9, 40]
    new = [1, 1, 1, 12, 1, 9, 3]
    sequences = [tokens(length, seed=20 + i) for i, length in enumerate(lengths)]
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths]
    expected = [reference_logits(folder, ids) for ids in sequences]
    for ids, table, count in zip(sequences, tables, new, strict=True):
        if len(ids) > count:
            lane.logits(Part(ids[:-count], 0, table))

    parts = [
        Part(ids[-count:], len(ids) - count, table) for ids, table, count in zip(sequences, tables, new, strict=True)
    ]
    ours = lane.logits(*parts)

    assert_close(ours, torch.cat([logits[-count:] for logits, count in zip(expected, new, strict=True)]))


def test_only_sequences_that_ask_for_it_are_sampled(checkpoint: Any) -> None:
    folder = checkpoint("llama")
    lane = ThreadLane(folder, tp=2)
    ids = tokens(12, seed=30)
    expected = reference_logits(folder, ids)
    table = blocks(9, seed=31)
    a, b, c = table[:3], table[3:6], table[6:]
    parts = [Part(ids[:5], 0, a, sample=None), Part(ids, 0, b), Part(ids[:9], 0, c, sample=None)]

    assert lane.sample(*parts) == [int(expected[-1].argmax())]
    assert lane.sample(parts[0]) == []


def test_bfloat16_is_as_near_to_float32_as_transformers_is(checkpoint: Any) -> None:
    folder = checkpoint("llama")
    lane = ThreadLane(folder, tp=2, args={"dtype": "bfloat16"})
    ids, table = tokens(60, seed=34), blocks(15, seed=35)
    expected = reference_logits(folder, ids)
    theirs = reference_logits(folder, ids, torch.bfloat16).float()

    ours = [lane.logits(Part(ids[:40], 0, table))]
    ours += [lane.logits(Part(ids[i : i + 1], i, table)) for i in range(40, 60)]

    error = (torch.cat(ours).float() - expected).square().mean().sqrt()
    assert error < 1.3 * (theirs - expected).square().mean().sqrt()

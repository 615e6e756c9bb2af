"""Sequences that share a step: each has the logits that it has alone, and those that ask for it are sampled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.model_harness import (
    Part,
    ThreadLane,
    assert_same_logits,
    make_checkpoint,
    reference_logits,
    some_token_ids,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"))


def test_a_mixed_batch_gives_each_sequence_its_own_logits(folder: Path) -> None:
    """Decodes of very different lengths around prefill chunks with and without context, in no order."""
    lane = ThreadLane(folder, num_blocks=128)
    free = random.Random(14).sample(range(128), 128)
    lengths = [3, 60, 1, 25, 58, 9, 40]
    new = [1, 1, 1, 12, 1, 9, 3]
    sequences = [some_token_ids(length, seed=20 + i) for i, length in enumerate(lengths)]
    tables = [[free.pop() for _ in range(-(-length // 4))] for length in lengths]
    expected = [reference_logits(folder, ids) for ids in sequences]
    for ids, table, count in zip(sequences, tables, new, strict=True):
        if len(ids) > count:
            lane.logits(Part(ids[:-count], 0, table))

    parts = [
        Part(ids[-count:], len(ids) - count, table) for ids, table, count in zip(sequences, tables, new, strict=True)
    ]
    ours = lane.logits(*parts)

    assert_same_logits(ours, torch.cat([logits[-count:] for logits, count in zip(expected, new, strict=True)]))


def test_only_sequences_that_ask_for_it_are_sampled(folder: Path) -> None:
    lane = ThreadLane(folder, tp=2)
    ids = some_token_ids(12, seed=30)
    expected = reference_logits(folder, ids)
    table = random.Random(31).sample(range(64), 9)
    a, b, c = table[:3], table[3:6], table[6:]
    parts = [Part(ids[:5], 0, a, sample=None), Part(ids, 0, b), Part(ids[:9], 0, c, sample=None)]

    assert lane.sample(*parts) == [int(expected[-1].argmax())]
    assert lane.sample(parts[0]) == []

"""Room for the KV cache, and its life."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_harness import Part, ThreadLane, make_checkpoint

from stagemesh.config.capacity import kv_bytes_per_token
from stagemesh.config.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("tp, partition", [(1, None), (2, (1, 2)), (4, (2, 1))])
def test_blocks_are_as_large_as_the_plan_says(folder: Path, tp: int, partition: tuple[int, ...] | None) -> None:
    lane = ThreadLane(folder, tp=tp, partition=partition, args={"kv_cache_memory_bytes": 10**6})
    for stage, ranks in enumerate(lane.stages):
        per_block = 4 * kv_bytes_per_token(lane.config.model, lane.config.plan, stage, 4)
        for runner in ranks:
            assert runner.kv_bytes_per_block() == per_block
            assert runner.max_kv_blocks() == 10**6 // per_block


def test_a_cache_larger_than_the_machine_is_refused(folder: Path) -> None:
    lane = ThreadLane(folder, args={"kv_cache_memory_bytes": 2**60})
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        lane.stages[0][0].max_kv_blocks()


def test_a_new_cache_can_be_used_at_once(folder: Path) -> None:
    lane = ThreadLane(folder)
    part = Part(list(range(10)), 0, [5, 6, 7])
    before = lane.logits(part)
    lane.stages[0][0].allocate_kv(8)
    torch.testing.assert_close(lane.logits(part), before)


def test_room_for_hidden_states_has_the_shape_and_dtype_of_what_is_sent(folder: Path) -> None:
    lane = ThreadLane(folder, args={"dtype": "bfloat16"})
    hidden = lane.stages[0][0].empty_hidden(5)
    assert (hidden.shape, hidden.dtype) == ((5, 64), torch.bfloat16)

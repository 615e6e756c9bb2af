"""Room for the KV cache, and its life."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model_harness import Part, ThreadLane, make_checkpoint, make_plan
from support.toy_lane import ints

from stagemesh.config.capacity import kv_bytes_per_token
from stagemesh.config.errors import ConfigError
from stagemesh.stages.messages.step import LogitsAdjustments, PromptLogprobsSpec, SampleSpec
from stagemesh.stages.worker import model_runner as runner_module


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


LAYOUTS = pytest.mark.parametrize("tp, partition", [(1, None), (2, None), (1, (1, 2)), (2, (2, 1))])


@LAYOUTS
def test_prompt_logprobs_are_those_of_the_models_logits(
    folder: Path, tp: int, partition: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "PROMPT_LOGPROBS_ROWS", 3)
    lane = ThreadLane(folder, tp=tp, partition=partition)
    first, second = Part([9, 8, 7, 6, 5], 0, [0, 1]), Part([3, 1, 4, 1, 5, 9, 2], 0, [2, 3], sample=None)
    expected = lane.logits(first, second).log_softmax(-1)
    plan = make_plan(first, second)
    plan.prompt_logprobs = [
        PromptLogprobsSpec(0, ints(8, 7, 6, 5), 2),
        PromptLogprobsSpec(1, ints(1, 4, 1, 5, 9, 2, 77), 0),
    ]
    result = lane.run(plan)
    assert len(result.token_ids) == 1 and result.logprobs == []
    whole, chunk = result.prompt_logprobs
    assert [entry.token_id for entry in whole] == [8, 7, 6, 5]
    assert [entry.token_id for entry in chunk] == [1, 4, 1, 5, 9, 2, 77]
    for row, entry in enumerate([*whole, None, *chunk]):
        if entry is not None:
            assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-4)
    assert whole[0].top_ids == expected[0].topk(2).indices.tolist()


@LAYOUTS
def test_edits_and_logprobs_are_the_same_in_every_layout(
    folder: Path, tp: int, partition: tuple[int, ...] | None
) -> None:
    def draws(lane: ThreadLane) -> list[tuple[int, int]]:
        edits = LogitsAdjustments(
            allowed=b"\xff" * 8, repetition_penalty=1.5, prompt_ids=ints(5, 6), presence_penalty=0.5
        )
        found = []
        for position in range(20):
            spec = SampleSpec(1.0, 0.95, 0, 0.0, 11, position, [7], edits if position % 2 else None, 1)
            result = lane.run(make_plan(Part([5, 6, 7], 0, [0], spec), Part([6, 5], 0, [1])))
            report, nothing = result.logprobs
            assert report is not None and nothing is None and report.token_id == result.token_ids[0]
            found.append((report.token_id, report.rank))
        return found

    assert draws(ThreadLane(folder, tp=tp, partition=partition)) == draws(ThreadLane(folder))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mixture"), "Mixtral", num_local_experts=5, num_experts_per_tok=2)


@pytest.mark.parametrize("args", [{}, {"enable_expert_parallel": True}])
@LAYOUTS
def test_every_choice_of_an_expert_in_every_step_is_counted_once(
    mixture: Path, tp: int, partition: tuple[int, ...] | None, args: dict[str, bool]
) -> None:
    lane = ThreadLane(mixture, tp=tp, partition=partition, args=args)
    expected = [[0] * 5 for _ in lane.stages]
    for part in (Part(list(range(30)), 0, list(range(9))), Part([7], 30, list(range(9))), Part([8, 9], 0, [10])):
        lane.sample(part)
        for counts, ranks in zip(expected, lane.stages, strict=True):
            for load in ranks[0].expert_load().values():
                counts[:] = [a + b for a, b in zip(counts, load, strict=True)]
    num_tokens, top_k = 33, 2
    for counts, ranks, num_layers in zip(expected, lane.stages, partition or (3,), strict=True):
        assert sum(counts) == num_tokens * top_k * num_layers
        assert [rank.take_expert_tokens() for rank in ranks] == [counts] + [[]] * (tp - 1)
        assert ranks[0].take_expert_tokens() == [], "taken"


def test_a_dense_model_has_no_experts_to_count(folder: Path) -> None:
    lane = ThreadLane(folder)
    lane.sample(Part([1, 2, 3], 0, [0]))
    assert lane.stages[0][0].take_expert_tokens() == []

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.config.errors import ConfigError
from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan, even_partition, expert_range, kv_heads


@pytest.fixture
def model(model_folder: Path) -> ModelConfig:
    """8 layers, 8 heads, 4 KV heads, intermediate size 128."""
    return ModelConfig.from_folder(model_folder)


@given(st.integers(1, 200), st.data())
def test_an_even_partition_covers_all_and_spares_the_ends(num_layers: int, data: st.DataObject) -> None:
    pp_size = data.draw(st.integers(1, num_layers))
    layers = even_partition(num_layers, pp_size)
    assert sum(layers) == num_layers
    assert len(layers) == pp_size
    assert max(layers) - min(layers) <= 1
    assert layers[-1] == min(layers)
    if num_layers % pp_size < pp_size - 1:
        assert layers[0] == min(layers)


def test_known_partitions() -> None:
    assert even_partition(8, 3) == (3, 3, 2)
    assert even_partition(9, 4) == (2, 2, 3, 2)
    assert even_partition(7, 2) == (4, 3)


@pytest.mark.parametrize(("tp_size", "kv_heads_per_rank"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_kv_heads_are_split_then_replicated(model: ModelConfig, tp_size: int, kv_heads_per_rank: int) -> None:
    assert ParallelPlan.resolve(model, tp_size, 1).kv_heads_per_rank == kv_heads_per_rank


def test_each_rank_holds_the_kv_heads_of_its_query_heads(write_model: Callable[..., Path]) -> None:
    def held(num_heads: int, num_kv_heads: int, tp_size: int) -> list[tuple[int, ...]]:
        shape = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": 8}
        model = ModelConfig.from_folder(write_model(**shape))
        return [kv_heads(model, tp_size, rank) for rank in range(tp_size)]

    assert held(6, 3, 2) == [(0, 0, 1), (1, 2, 2)]
    assert held(12, 6, 4) == [(0, 0, 1), (1, 2, 2), (3, 3, 4), (4, 5, 5)]
    assert held(12, 3, 2) == [(0, 0, 1), (1, 2, 2)]  # two query heads for each
    assert held(8, 2, 4) == [(0,), (0,), (1,), (1,)]
    assert held(8, 4, 2) == [(0, 1), (2, 3)]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_every_query_head_finds_its_kv_head(num_kv_heads: int, group: int, tp_size: int) -> None:
    num_heads = num_kv_heads * group
    if num_heads % tp_size:
        return
    model = SimpleNamespace(num_heads=num_heads, num_kv_heads=num_kv_heads)
    shares = [kv_heads(cast(ModelConfig, model), tp_size, rank) for rank in range(tp_size)]
    assert len({len(share) for share in shares}) == 1
    served = [head for share in shares for head in share for _ in range(num_heads // tp_size // len(share))]
    assert served == [head // group for head in range(num_heads)]


def test_layer_ranges_follow_an_uneven_partition(model: ModelConfig) -> None:
    plan = ParallelPlan.resolve(model, 1, 3, [2, 5, 1])
    assert plan.layer_ranges == ((0, 2), (2, 7), (7, 8))
    assert [plan.num_layers(stage) for stage in range(3)] == [2, 5, 1]


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "message"),
    [
        (3, 2, "tensor_parallel_size=3: does not divide num_attention_heads=8.*2x3, 1x6"),
        (0, 1, "tensor_parallel_size=0: must be at least 1.*1x1"),
        (1, 9, "pipeline_parallel_size=9: must be within 1 and num_hidden_layers=8.*1x8"),
        (16, 1, "tensor_parallel_size=16: does not divide.*8x2"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_the_nearest_that_do(
    model: ModelConfig, tp_size: int, pp_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelPlan.resolve(model, tp_size, pp_size)


def test_tensor_parallel_size_must_fit_the_mlp(write_model: Callable[..., Path]) -> None:
    narrow = ModelConfig.from_folder(write_model(intermediate_size=130))
    with pytest.raises(ConfigError, match="does not divide intermediate_size=130"):
        ParallelPlan.resolve(narrow, 4, 1)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ([4, 4], "names 2 stages, pipeline_parallel_size=3"),
        ([4, 4, 0], "every stage needs at least 1 layer"),
        ([3, 3, 3], "adds up to 9, the model has num_hidden_layers=8"),
    ],
)
def test_a_partition_that_cannot_work_is_refused_with_one_that_does(
    model: ModelConfig, partition: list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message + r"; \[3, 3, 2\] would work"):
        ParallelPlan.resolve(model, 1, 3, partition)


MIXTURE = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 6, "num_experts_per_tok": 2}


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_expert_has_one_owner_and_no_rank_two_more_than_another(num_experts: int, size: int) -> None:
    shares = [expert_range(num_experts, size, rank) for rank in range(size)]
    assert [expert for share in shares for expert in share] == list(range(num_experts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_whole_experts_need_not_be_divisible(write_model: Callable[..., Path]) -> None:
    model = ModelConfig.from_folder(write_model(**MIXTURE, intermediate_size=33))
    assert ParallelPlan.resolve(model, 4, 1, expert_parallel=True).expert_parallel
    with pytest.raises(ConfigError, match="does not divide intermediate size of an expert=33"):
        ParallelPlan.resolve(model, 4, 1)
    few = ModelConfig.from_folder(write_model(**{**MIXTURE, "num_local_experts": 3}))
    with pytest.raises(ConfigError, match="tensor_parallel_size=4: is more than the 3 experts"):
        ParallelPlan.resolve(few, 4, 1, expert_parallel=True)


def test_expert_parallelism_needs_experts(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel=True: LlamaForCausalLM has no experts"):
        ParallelPlan.resolve(model, 2, 1, expert_parallel=True)

"""The worked layouts of guides to distributed inference, and what must hold for every other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_configs import CONFIGS, known_model

from stagemesh.config.capacity import kv_bytes_per_token
from stagemesh.config.errors import ConfigError
from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.planner.hardware import make_cluster
from stagemesh.config.planner.layouts import Layout, balanced_partition
from stagemesh.config.planner.report import Plan, make_plan, make_workload

GiB = 2**30


def plan_for(model: str, gpus: str, hardware: dict[str, Any] | None = None, **target: Any) -> Plan:
    work = make_workload(known_model(model), **({"concurrency": 32, "context": 8192} | target))
    return make_plan(work, make_cluster(gpus, **(hardware or {})))


def sizes(layout: Layout) -> tuple[int, int, int, bool]:
    """tp, pp, dp, ep."""
    return layout.plan.tp_size, layout.plan.pp_size, layout.dp_size, layout.plan.expert_parallel


TWO = {"nodes": 2}


@pytest.mark.parametrize(
    ("model", "gpus", "hardware", "target", "expected"),
    [
        ("llama-70b", "4xA100-80GB", {}, {}, (4, 1, 1, False)),
        ("llama-70b", "4xRTX-PRO-6000-96GB", {}, {}, (4, 1, 1, False)),
        ("llama-70b", "4xRTX-PRO-6000-96GB", {}, {"quantization": "fp8"}, (4, 1, 1, False)),
        ("llama-70b", "8xRTX-PRO-6000-96GB", TWO, {"quantization": "fp8"}, (4, 1, 2, False)),
        ("llama-70b", "4xRTX-5090-32GB", {}, {"quantization": "awq", "concurrency": 16}, (4, 1, 1, False)),
        ("llama-405b", "8xRTX-PRO-6000-96GB", TWO, {"quantization": "fp8"}, (4, 2, 1, False)),
        ("llama-405b", "16xA100-80GB", TWO, {}, (8, 2, 1, False)),
        # No NVLink: eight cards share PCIe's lanes, of any generation.
        ("llama-70b", "8xL40S-48GB", {}, {}, (1, 8, 1, False)),
        ("llama-70b", "8xL40S-48GB", {"intra": "pcie5"}, {}, (1, 8, 1, False)),
        ("llama-70b", "8xL40S-48GB", TWO | {"intra": "pcie5"}, {}, (4, 2, 1, False)),
        # Six and five cards do not divide 64 heads.
        ("llama-70b", "6xL40S-48GB", {}, {"concurrency": 16}, (1, 6, 1, False)),
        ("llama-70b", "5xL40S-48GB", {}, {"concurrency": 8}, (1, 5, 1, False)),
        # One card holds it: copies for throughput, a cut for latency.
        ("llama-8b", "8xH100-80GB", {}, {"objective": "throughput"}, (1, 1, 8, False)),
        ("llama-8b", "8xH100-80GB", {}, {}, (8, 1, 1, False)),
        ("llama-70b", "4xRTX-PRO-6000-96GB", {}, {"quantization": "fp8", "objective": "throughput"}, (2, 1, 2, False)),
        ("mixtral-8x7b", "4xA100-40GB", {}, {}, (4, 1, 1, True)),
        ("deepseek-v3", "8xH200-141GB", {}, {}, (8, 1, 1, True)),
        ("deepseek-v3", "16xH100-80GB", TWO | {"inter": "IB-NDR"}, {}, (8, 2, 1, True)),
    ],
)
def test_worked_layouts(
    model: str, gpus: str, hardware: dict[str, Any], target: dict[str, Any], expected: tuple[int, int, int, bool]
) -> None:
    plan = plan_for(model, gpus, hardware, **target)
    assert sizes(plan.best) == expected
    assert plan.best.holds_all


def test_kv_of_32_requests_of_70b_is_80_gib() -> None:
    model = known_model("llama-70b")
    per_token = kv_bytes_per_token(model, ParallelPlan.resolve(model, 1, 1), 0, 2)
    assert per_token == 320 * 1024
    assert 8192 * per_token == 2.5 * GiB
    assert 32 * 8192 * per_token == 80 * GiB
    best = plan_for("llama-70b", "4xA100-80GB").best
    assert best.stages[0].kv_bytes_per_token == 80 * 1024


def test_70b_in_fp8_leaves_about_250_gb_on_four_cards_of_96() -> None:
    best = plan_for("llama-70b", "4xRTX-PRO-6000-96GB", quantization="fp8").best
    assert 4 * best.stages[0].kv_bytes / 1e9 == pytest.approx(260, abs=20)


def test_two_cards_of_80_gb_hold_70b_but_not_its_requests() -> None:
    plan = plan_for("llama-70b", "2xA100-80GB")
    assert sizes(plan.best) == (2, 1, 1, False)
    assert not plan.best.holds_all and plan.best.max_concurrency < 2
    assert any("the planned requests need" in warning for warning in plan.warnings)


def test_a_cache_that_the_requests_nearly_fill_is_warned_of() -> None:
    most = int(plan_for("llama-70b", "4xA100-80GB").best.max_concurrency)
    full = plan_for("llama-70b", "4xA100-80GB", concurrency=most)
    assert full.best.holds_all
    assert any("above 95 % the engine preempts" in warning for warning in full.warnings)
    assert not any("KV:" in warning for warning in plan_for("llama-70b", "4xA100-80GB").warnings)


def test_more_machines_of_a_cut_that_fills_two_are_copies() -> None:
    plan = plan_for("llama-405b", "32xA100-80GB", {"nodes": 4, "inter": "IB-NDR"})
    assert sizes(plan.best)[:2] == (8, 2) and plan.best.dp_size == 2


def test_unequal_cards_get_layers_by_their_memory_and_speed() -> None:
    plan = plan_for("llama-70b", "4xA100-80GB,4xL40S-48GB", {"nodes": 2})
    pipelines = [layout for layout in plan.layouts if layout.plan.pp_size > 1]
    assert pipelines
    for layout in pipelines:
        by_gpu = {stage.gpu.name: stage.layers[1] - stage.layers[0] for stage in layout.stages}
        assert by_gpu["A100-80GB"] > by_gpu["L40S-48GB"]
    assert not any(
        "A100" in stage.gpu.name and "L40S" in stage.gpu.name
        for layout in plan.layouts
        for stage in layout.stages
        if layout.dp_size == 1
    )
    mixed = plan_for("llama-70b", "4xA100-80GB,4xL40S-48GB")
    assert any("mix unequal GPUs" in reason for reason in mixed.refusals())


def test_embedding_and_head_count_in_a_balanced_split() -> None:
    assert balanced_partition([1.0] * 8, 0, 0, (1, 1)) == (4, 4)
    assert balanced_partition([1.0] * 8, 2, 0, (1, 1)) == (3, 5)
    assert balanced_partition([1.0] * 8, 0, 4, (1, 1)) == (6, 2)
    assert balanced_partition([1.0] * 9, 0, 0, (2, 1)) == (6, 3)
    # Every stage has a layer, however small its share.
    assert balanced_partition([1.0] * 4, 0, 100, (1, 1, 1, 1)) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("gpus", "hardware", "words"),
    [
        ("8xL40S-48GB", {"intra": "pcie5"}, "pcie5 gives a card 32 GB/s each way, TP wants 50"),
        ("6xH100-80GB", {}, "6 GPUs do not divide the 64 heads"),
    ],
)
def test_a_layout_says_which_rule_speaks_against_it(gpus: str, hardware: dict[str, Any], words: str) -> None:
    plan = plan_for("llama-70b", gpus, hardware, concurrency=16)
    assert any(words in plan.against(layout) for layout in plan.layouts[1:])
    assert any("by arithmetic alone" in warning for warning in plan.warnings)


def test_what_cannot_be_is_refused_with_its_reason() -> None:
    plan = plan_for("llama-70b", "12xA100-80GB", {"nodes": 2})
    names = {name: reason for reason, group in plan.refusals().items() for name in group}
    assert names["TP=3"] == "does not divide num_attention_heads=64"
    assert "InfiniBand" in names["TP>6"]
    with pytest.raises(ConfigError, match="weights take 141.1 GB of a L40S-48GB"):
        plan_for("llama-70b", "1xL40S-48GB")
    with pytest.raises(ConfigError, match="context=9999999: must be within 1"):
        plan_for("llama-70b", "8xA100-80GB", context=9_999_999)


def test_a_request_alone_is_told_that_stages_do_not_help_it() -> None:
    plan = plan_for("llama-70b", "8xL40S-48GB", concurrency=1)
    assert any("PP only adds hops" in warning for warning in plan.warnings)


MODELS = st.sampled_from(sorted(CONFIGS))
TARGETS = st.fixed_dictionaries(
    {
        "concurrency": st.sampled_from([1, 7, 32, 300]),
        "context": st.sampled_from([512, 8192, 20000]),
        "objective": st.sampled_from(["latency", "throughput"]),
    }
)
CARDS = st.sampled_from(["T4-16GB", "L40S-48GB", "A100-80GB", "H200-141GB"])
NODES = st.sampled_from([(1, 1), (1, 4), (1, 6), (2, 4), (2, 8), (3, 5)])


def _plan(model: str, cluster: Any, target: dict[str, Any]) -> Plan | None:
    try:
        return make_plan(make_workload(known_model(model), **target), cluster)
    except ConfigError as error:
        assert "does not fit" in str(error)
        return None


@given(MODELS, TARGETS, CARDS, CARDS, NODES)
@settings(max_examples=120, deadline=None)
def test_no_layout_breaks_memory_or_divisibility(
    model: str, target: dict[str, Any], card: str, other: str, shape: tuple[int, int]
) -> None:
    nodes, each = shape
    cluster = make_cluster(",".join(f"{each}x{name}" for name in (card, other, card)[:nodes]), nodes=nodes)
    plan = _plan(model, cluster, target)
    for layout in plan.layouts if plan else ():
        cut = layout.plan
        assert plan is not None and plan.work.model.num_heads % cut.tp_size == 0
        assert cut.tp_size <= each and layout.num_gpus <= nodes * each
        assert sum(layout.partition) == plan.work.model.num_layers and min(layout.partition) >= 1
        assert all(before[1] == after[0] for before, after in pairwise(cut.layer_ranges))
        for stage in layout.stages:
            needed = stage.weight_bytes + stage.other_bytes + layout.kv_tokens * stage.kv_bytes_per_token
            assert needed <= stage.gpu.memory_bytes
        assert layout.kv_tokens >= plan.work.context


@given(MODELS, TARGETS, NODES, st.integers(8, 200), st.integers(1, 60))
@settings(max_examples=120, deadline=None)
def test_more_memory_never_makes_a_plan_worse(
    model: str, target: dict[str, Any], shape: tuple[int, int], memory: int, more: int
) -> None:
    nodes, each = shape

    def with_memory(size: int) -> Plan | None:
        spec = f"X=mem:{size},bw:2000,flops:400,link:nvlink4"
        return _plan(model, make_cluster(f"{nodes * each}xX", nodes=nodes, gpu_specs=[spec]), target)

    small, large = with_memory(memory), with_memory(memory + more)
    if small is not None:
        assert large is not None
        assert large.best.score <= small.best.score

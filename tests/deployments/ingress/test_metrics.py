"""What Prometheus reads, from the stats of lanes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from stagemesh.deployments.ingress.lanes import LaneClientCounts
from stagemesh.deployments.ingress.metrics import Metrics
from stagemesh.stages.messages.request import LaneStats


def stats(lane: str, **changes: Any) -> LaneStats:
    numbers = {name: 0 for name in LaneStats.__struct_fields__ if not name.startswith("expert")}
    return LaneStats(**(numbers | {"lane": lane, "state": "serving"} | changes))


def samples(*lane_stats: LaneStats) -> dict[tuple[str, str, str], float]:
    """(name, lane, expert) → value."""
    lanes: Any = SimpleNamespace(lane_stats=lambda: lane_stats, counts=lambda: LaneClientCounts(resumed=3, dropped=5))
    text = Metrics("tiny", lanes).render().decode()
    return {
        (sample.name, sample.labels.get("lane", ""), sample.labels.get("expert", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_expert_load_of_each_lane_is_a_counter_per_expert_and_a_gauge() -> None:
    found = samples(
        stats("a", expert_tokens=[5, 0, 7], expert_imbalance=1.75),
        stats("b", expert_tokens=[1, 2, 3], expert_imbalance=1.5),
    )
    experts = {key: value for key, value in found.items() if "expert" in key[0]}
    assert experts == {
        ("stagemesh:expert_tokens_total", "a", "0"): 5,
        ("stagemesh:expert_tokens_total", "a", "1"): 0,
        ("stagemesh:expert_tokens_total", "a", "2"): 7,
        ("stagemesh:expert_tokens_total", "b", "0"): 1,
        ("stagemesh:expert_tokens_total", "b", "1"): 2,
        ("stagemesh:expert_tokens_total", "b", "2"): 3,
        ("stagemesh:expert_load_imbalance", "a", ""): 1.75,
        ("stagemesh:expert_load_imbalance", "b", ""): 1.5,
    }


def test_a_dense_model_has_no_metric_of_experts() -> None:
    found = samples(stats("a", num_steps=3))
    assert found["stagemesh:engine_steps_total", "a", ""] == 3
    assert not [name for name, _, _ in found if "expert" in name]


def test_what_the_router_resumed_and_dropped_is_counted() -> None:
    found = samples()
    assert found["stagemesh:requests_resumed_total", "", ""] == 3
    assert found["stagemesh:messages_dropped_total", "", ""] == 5

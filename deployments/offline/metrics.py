"""`LLM.get_metrics`: the counters of the lanes, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.stages.messages.request import LaneStats


@dataclass
class Metric:
    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """Over the life of the lane."""

    value: int


@dataclass
class Gauge(Metric):
    value: float


def metrics_of(stats: LaneStats, labels: dict[str, str]) -> Iterator[Metric]:
    used = stats.num_blocks - stats.num_free_blocks
    gauges = {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage_perc": used / max(1, stats.num_blocks),
    }
    counters = {
        "num_preemptions": stats.num_preemptions,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "prefix_cache_queries": stats.prefix_queries,
        "prefix_cache_hits": stats.prefix_hits,
    }
    yield from (Gauge(f"vllm:{name}", labels, gauge) for name, gauge in gauges.items())
    yield from (Counter(f"vllm:{name}", labels, count) for name, count in counters.items())

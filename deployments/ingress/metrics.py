"""Prometheus metrics under vLLM's names, so that vLLM's dashboards work.

Every router shows the stats of all lanes, but latencies of its own requests only: their histograms add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stagemesh.deployments.ingress.lanes import LaneClient
from stagemesh.stages.messages.request import LaneStats

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_SLOW_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)

# (name, help, value of one lane); a name that ends in _total is a counter.
_LANE_METRICS: tuple[tuple[str, str, Callable[[LaneStats], float]], ...] = (
    ("vllm:num_requests_running", "Requests in the running batch.", lambda stats: stats.num_running),
    ("vllm:num_requests_waiting", "Requests waiting to be scheduled.", lambda stats: stats.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "KV cache blocks in use, 1 = all.",
        lambda stats: 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0,
    ),
    ("stagemesh:kv_blocks_free", "KV cache blocks free or evictable.", lambda stats: stats.num_free_blocks),
    ("stagemesh:kv_blocks_total", "KV cache blocks in all.", lambda stats: stats.num_blocks),
    ("vllm:num_preemptions_total", "Sequences preempted.", lambda stats: stats.num_preemptions),
    ("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", lambda stats: stats.prefix_queries),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_hits),
    ("vllm:prompt_tokens_total", "Prompt tokens processed.", lambda stats: stats.prompt_tokens),
    ("vllm:generation_tokens_total", "Tokens generated.", lambda stats: stats.generation_tokens),
    ("stagemesh:engine_steps_total", "Engine steps.", lambda stats: stats.num_steps),
    ("stagemesh:engine_schedule_seconds_total", "Scheduling and plan building.", lambda stats: stats.schedule_s),
    (
        "stagemesh:engine_outside_seconds_total",
        "What steps took beside the model and waits for other steps.",
        lambda stats: stats.step_overhead_s,
    ),
    ("stagemesh:engine_model_seconds_total", "Inside the model, over steps and stages.", lambda stats: stats.model_s),
)


class Metrics:
    """Of one router, in a registry of its own. Call it from the router's event loop."""

    def __init__(self, model_name: str, lanes: LaneClient) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_LaneCollector(model_name, lanes))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, help, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model_name)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "From an accepted request to its first token.", _FAST_S
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Between two deliveries of tokens of one answer.", _FAST_S
        )
        self.e2e_latency = histogram(
            "vllm:e2e_request_latency_seconds", "From an accepted request to its last token.", _SLOW_S
        )
        finished = Counter(
            "vllm:request_success",
            "Answers by the reason they ended: stop, length, abort (the client left), error.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        refused = Counter(
            "stagemesh:requests_refused",
            "Requests refused with 429 because there was no room.",
            ["model_name"],
            registry=self._registry,
        )
        self.refused = refused.labels(model_name)
        self.finished = {reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _LaneCollector(Collector):
    def __init__(self, model_name: str, lanes: LaneClient) -> None:
        self._model_name = model_name
        self._lanes = lanes

    def collect(self) -> Iterator[Metric]:
        counts = self._lanes.counts()
        for name, help, count in (
            ("stagemesh:requests_resumed_total", "Times that a request went on in another lane.", counts.resumed),
            ("stagemesh:messages_dropped_total", "Messages to this router that it could not use.", counts.dropped),
        ):
            total = CounterMetricFamily(name, help, labels=["model_name"])
            total.add_metric([self._model_name], count)
            yield total
        lane_stats = list(self._lanes.lane_stats())
        for name, help, value_of in _LANE_METRICS:
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, help, labels=["model_name", "lane"])
            for stats in lane_stats:
                metric.add_metric([self._model_name, stats.lane], value_of(stats))
            yield metric
        yield from self._expert_metrics(lane_stats)

    def _expert_metrics(self, lane_stats: list[LaneStats]) -> Iterator[Metric]:
        """Of mixtures of experts. Workers report about once a second; every step counts; the imbalance is of one."""
        tokens = CounterMetricFamily(
            "stagemesh:expert_tokens_total",
            "Tokens routed to the experts of a number, over all mixture layers: tokens x top_k x layers in all.",
            labels=["model_name", "lane", "expert"],
        )
        imbalance = GaugeMetricFamily(
            "stagemesh:expert_load_imbalance",
            "Tokens of a layer's busiest expert over the mean, mean over layers, in the last step reported; 1 = even.",
            labels=["model_name", "lane"],
        )
        for stats in lane_stats:
            for expert, count in enumerate(stats.expert_tokens):
                tokens.add_metric([self._model_name, stats.lane, str(expert)], count)
            if stats.expert_tokens:
                imbalance.add_metric([self._model_name, stats.lane], stats.expert_imbalance)
        if tokens.samples:
            yield tokens
            yield imbalance

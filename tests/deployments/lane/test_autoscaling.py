"""Pools: a burst brings a second lane, quiet takes it away, and no request fails on the way."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.harness import Cluster, eventually

DEMO_POOL = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 6,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 8,
}


def lanes(cluster: Cluster) -> dict[str, float]:
    """Tokens generated so far by every lane that is there."""
    text = httpx.get(f"{cluster.url}/metrics", timeout=5).text
    return {
        sample.labels["lane"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:generation_tokens_total"
    }


def test_a_burst_grows_the_demo_to_two_lanes_and_back_without_a_failed_request(cluster: Cluster) -> None:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2, autoscaling_config=DEMO_POOL)
    assert len(lanes(cluster)) == 1
    statuses: list[int] = []
    stop_at = time.monotonic() + 240

    def client(i: int) -> None:
        n = 0
        with cluster.client() as http:
            while time.monotonic() < stop_at:
                n += 1
                body = {"model": "demo", "prompt": f"Scene {i}-{n}.", "max_tokens": 64, "ignore_eos": True}
                statuses.append(http.post("/v1/completions", json=body).status_code)

    with ThreadPoolExecutor(16) as pool:
        futures: list[Future[None]] = [pool.submit(client, i) for i in range(16)]
        eventually(lambda: len(lanes(cluster)) == 2, 200, "a second lane")
        # Both serve: different prefixes go to different lanes.
        before = lanes(cluster)
        eventually(
            lambda: all(lanes(cluster)[lane] > before[lane] + 100 for lane in before),
            30,
            "both lanes generate",
        )
        stop_at = 0.0
        for future in futures:
            future.result(timeout=120)
    assert statuses and set(statuses) == {200}

    body = {"model": "demo", "prompt": "the same long prefix for everyone " * 10, "max_tokens": 4}
    with cluster.client() as http:
        cached = [
            http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _ in range(6)
        ]
    assert cached[0] == 0
    assert all(count > 0 for count in cached[1:]), f"the same prefix did not stay on one lane: {cached}"

    def one_lane_answers() -> bool:
        with cluster.client() as http:
            status = http.post("/v1/completions", json={**body, "prompt": "quiet"}).status_code
        assert status == 200, "a request failed while scaling down"
        return len(lanes(cluster)) == 1

    eventually(one_lane_answers, 90, "back to one lane")

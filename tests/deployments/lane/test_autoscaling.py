"""Pools: a burst brings a second lane, quiet takes it away, and no request fails on the way."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

from support.harness import DEMO_POOL, Cluster, eventually

GENERATED = "vllm:generation_tokens_total"


def test_a_burst_grows_the_demo_to_two_lanes_and_back_without_a_failed_request(cluster: Cluster) -> None:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2, autoscaling_config=DEMO_POOL)
    assert len(cluster.lanes()) == 1
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
        eventually(lambda: len(cluster.lanes()) == 2, 200, "a second lane")
        # Both serve: different prefixes go to different lanes.
        before = cluster.lanes()
        eventually(
            lambda: all(cluster.lanes()[lane][GENERATED] > before[lane][GENERATED] + 100 for lane in before),
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
        return len(cluster.lanes()) == 1

    eventually(one_lane_answers, 90, "back to one lane")

"""SIGKILL of every kind of process during running requests: the service heals itself, requests end."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.harness import Cluster, chat, eventually

from stagemesh.deployments.cli.processes import descendants

NUM_REQUESTS = 8
PROMPTS = [f"Act {i}. Enter the king and" for i in range(NUM_REQUESTS)]
BODY = {"model": "demo", "max_tokens": 120, "temperature": 0, "ignore_eos": True}


VICTIMS = {"worker": "ray::ShardWorker.run", "stage-1": ":stage-1", "leader": ":stage-0", "router": ":router"}
"""By a part of the title that Ray gives the process."""


def victim(kind: str) -> int:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants()}
    return [pid for pid, title in titles.items() if title.startswith("ray::") and VICTIMS[kind] in title][-1]


def complete(cluster: Cluster, prompt: str, **fields: Any) -> httpx.Response:
    with cluster.client() as client:
        return client.post("/v1/completions", json={**BODY, "prompt": prompt, **fields}, timeout=120)


def deploy(cluster: Cluster) -> None:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[str]:
    """The answer to each prompt, asked alone."""
    deploy(cluster)
    return [complete(cluster, prompt).json()["choices"][0]["text"] for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["worker", "stage-1", "leader"])
def test_a_kill_is_a_pause_and_the_service_is_whole_again(cluster: Cluster, undisturbed: list[str], kind: str) -> None:
    deploy(cluster)
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        running: list[Future[httpx.Response]] = [pool.submit(complete, cluster, prompt) for prompt in PROMPTS]
        eventually(lambda: cluster.metrics()["vllm:num_requests_running"] == NUM_REQUESTS, 10, "all run")
        os.kill(victim(kind), signal.SIGKILL)
        responses = [future.result(timeout=120) for future in running]
    for response, text in zip(responses, undisturbed, strict=True):
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == text
    started = time.monotonic()
    cluster.wait_ready(60)
    with cluster.client() as client:
        assert chat(client, "What is 17+25?") == "42"
    print(f"{kind}: whole again {time.monotonic() - started:.1f} s after the last answer")


def test_the_sequences_of_a_router_end_with_it(cluster: Cluster) -> None:
    deploy(cluster)
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        for prompt in PROMPTS:
            pool.submit(complete, cluster, prompt, max_tokens=1500)
        eventually(lambda: cluster.metrics()["vllm:num_requests_running"] == NUM_REQUESTS, 10, "all run")
        os.kill(victim("router"), signal.SIGKILL)
        cluster.wait_ready(60)  # another router: it takes seconds, and 1500 tokens for each would take far longer
        eventually(lambda: cluster.metrics()["vllm:num_requests_running"] == 0, 2, "the leader has dropped them")
        assert cluster.metrics()["vllm:kv_cache_usage_perc"] == 0
        assert cluster.metrics()["vllm:generation_tokens_total"] < NUM_REQUESTS * 1000

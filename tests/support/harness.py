"""A Ray instance with Serve on it and one stagemesh application: for the tests through HTTP and for the benches."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx

from stagemesh.config.serve_yaml import GRPC_SERVICERS, SERVE_ENVIRONMENT
from stagemesh.deployments.cli.processes import adopt_orphans, end_descendants

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "config" / "models" / "demo"
DEMO_MOE = REPO / "config" / "models" / "demo-moe"
READY_TIMEOUT_S = 120.0
END_GRACE_S = 2.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def haproxy_ports() -> dict[str, str]:
    """Environment for HAProxy's own two ports, which are the same for every Serve on a machine otherwise."""
    return {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}


DEMO_POOL: dict[str, Any] = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 6,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 8,
}
"""Grows to two lanes under a burst, and back."""


@dataclass
class Cluster:
    """The session's Ray instance, and at most one application on it."""

    http_port: int
    grpc_port: int
    args: dict[str, Any] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def deploy(self, **args: Any) -> None:
        """Run the application with these YAML args; nothing happens if it runs with them already."""
        from ray import serve

        from stagemesh.deployments.app import build

        wanted = {"model": str(DEMO), "dtype": "float32", "served_model_name": "demo", **args}
        if self.args == wanted:
            return
        self.delete()
        serve.run(build(wanted), name="stagemesh", route_prefix="/")
        self.args = wanted
        self.wait_ready()

    def delete(self) -> None:
        from ray import serve

        if self.args is not None:
            serve.delete("stagemesh")
            self.args = None

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        eventually(lambda: httpx.get(f"{self.url}/ready", timeout=5).status_code == 200, timeout_s, "/ready says 200")

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **kwargs)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics, summed over their labels."""
        sums: dict[str, float] = {}
        for sample in self._samples():
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def lanes(self) -> dict[str, dict[str, float]]:
        """What the router shows of each lane that reports and has blocks, by its label: values by metric."""
        found: dict[str, dict[str, float]] = {}
        for sample in self._samples():
            if "lane" in sample.labels:
                found.setdefault(sample.labels["lane"], {})[sample.name] = sample.value
        return {lane: values for lane, values in found.items() if values.get("stagemesh:kv_blocks_total", 0) > 0}

    def _samples(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=10).text):
            yield from family.samples

    def settled_metrics(self) -> dict[str, float]:
        """Metrics of an idle service: workers report their times about once a second."""
        time.sleep(2.5)
        return self.metrics()


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until `condition` holds; an exception in it counts as not yet."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
            last = "false"
        except (httpx.HTTPError, AssertionError, LookupError) as error:
            last = repr(error)
        time.sleep(0.1)
    raise TimeoutError(f"not within {timeout_s:g} s: {what} (last: {last})")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Ray and Serve, behind HAProxy as the YAML files switch it on; everything is ended on leaving."""
    os.environ.update(SERVE_ENVIRONMENT)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Behind a load balancer of its own a router must stay reachable for a while; here nobody would notice.
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0.5"
    # Two busy cores may take a while to start a proxy.
    os.environ["RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S"] = "120"
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    os.environ.update(haproxy_ports())
    import ray
    from ray import serve

    adopt_orphans()  # Serve's HAProxy outlives its manager when the cluster goes quickly
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    cluster = Cluster(free_port(), free_port())
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": "127.0.0.1", "port": cluster.http_port},
            grpc_options={"port": cluster.grpc_port, "grpc_servicer_functions": GRPC_SERVICERS},
        )
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        end_descendants(END_GRACE_S)


def skills() -> ModuleType:
    """tests/training/skills.py: what the demo models were trained on."""
    if "skills" not in sys.modules:
        spec = importlib.util.spec_from_file_location("skills", REPO / "tests" / "training" / "skills.py")
        assert spec is not None and spec.loader is not None
        sys.modules["skills"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["skills"])
    return sys.modules["skills"]


def held_out(skill: str, count: int, seed: int) -> list[Any]:
    """Checkable prompts that no demo model was trained on."""
    examples: list[Any] = skills().held_out(skill, count, seed)
    return examples


def mixed_prompts(count: int) -> list[str]:
    """Held-out prompts of every skill."""
    names = skills().SKILLS
    return [example.prompt for skill in names for example in held_out(skill, count // len(names), seed=11)]


def num_right(cluster: Cluster, skill: str, count: int) -> int:
    """How many of `count` held-out questions the served model answers exactly, asked 16 at a time."""
    examples = held_out(skill, count, seed=5)
    with cluster.client() as client, ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda example: chat(client, example.prompt, max_tokens=16), examples))
    return sum(text.strip() == example.answer for text, example in zip(texts, examples, strict=True))


def greedy_and_seeded(cluster: Cluster, prompts: list[str]) -> list[str]:
    """Each prompt's greedy answer, and of every fifth one also a seeded one at temperature 1."""

    def ask(job: tuple[str, dict[str, Any]]) -> str:
        return chat(client, job[0], max_tokens=24, **job[1])

    jobs: list[tuple[str, dict[str, Any]]] = [(prompt, {}) for prompt in prompts]
    jobs += [(prompt, {"temperature": 1.0, "seed": i, "ignore_eos": True}) for i, prompt in enumerate(prompts[::5])]
    with cluster.client() as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, jobs))


def chat(client: httpx.Client, prompt: str, **settings: Any) -> str:
    """One greedy chat answer."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        **settings,
    }
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text

"""`stagemesh status`: lanes, stages, KV cache and queues of a running server."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import defaultdict
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.cli.client import Client, ServerError
from stagemesh.deployments.cli.launch import serve_command
from stagemesh.deployments.cli.talk import DEFAULT_URL, ApiKey, Url

SERVE_TIMEOUT_S = 20.0
COLUMNS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv": "vllm:kv_cache_usage_perc",
    "blocks": "stagemesh:kv_blocks_total",
    "prompt tokens": "vllm:prompt_tokens_total",
    "output tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
}


def status(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a server's lanes and stages are doing. Exit status 1 while none can generate."""
    client = Client(url, api_key)
    console = Console()
    state = read_status(client)
    if as_json:
        print(json.dumps(state))
    elif not watch:
        console.print(render(state, None))
    else:
        watch_status(client, state, console)
    raise typer.Exit(0 if state["ready"] else 1)


def watch_status(client: Client, state: dict[str, Any], console: Console, period_s: float = 2.0) -> None:
    """Until Ctrl-C."""
    try:
        with Live(render(state, None), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(period_s)
                before, state = state, read_status(client)
                live.update(render(state, before), refresh=True)
    except KeyboardInterrupt:
        pass


def read_status(client: Client) -> dict[str, Any]:
    """{"url", "time", "ready", "lanes": {lane: {column: number}}, "deployments", "serve_problem"}.

    Raises ConfigError where no server answers.
    """
    try:
        client.get("/ready")
        is_ready = True
    except ServerError:  # 503: no lane can generate
        is_ready = False
    state = {"url": client.url, "time": time.time(), "ready": is_ready}
    return state | {"lanes": lanes_of(client.get("/metrics").decode())} | _deployments()


def lanes_of(metrics: str) -> dict[str, dict[str, float]]:
    """Prometheus text to the COLUMNS of each lane."""
    from prometheus_client.parser import text_string_to_metric_families

    column_of = {name: column for column, name in COLUMNS.items()}
    lanes: dict[str, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in column_of and "lane" in sample.labels:
                lanes[sample.labels["lane"]][column_of[sample.name]] = sample.value
    return dict(lanes)


def _deployments() -> dict[str, Any]:
    """What Serve on this machine says; only the reason where it says nothing, as for a server elsewhere."""
    try:
        env = {"RAY_AUTH_MODE": "token", **os.environ}  # a cluster asks for its token unless told otherwise
        command = [serve_command(), "status"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SERVE_TIMEOUT_S, env=env)
        applications = (yaml.safe_load(done.stdout) or {})["applications"]
        deployments = applications["stagemesh"]["deployments"]
    except (ConfigError, OSError, subprocess.TimeoutExpired, yaml.YAMLError, KeyError, TypeError):
        return {"deployments": {}, "serve_problem": "`serve status` shows no stagemesh application on this machine"}
    shown = {
        name: {"status": one["status"], "replicas": one.get("replica_states") or {}, "message": one.get("message", "")}
        for name, one in deployments.items()
    }
    return {"deployments": shown, "serve_problem": None}


def render(state: dict[str, Any], before: dict[str, Any] | None) -> RenderableType:
    """Tables; rates need the status before."""
    word = "ready" if state["ready"] else "not ready: no lane can generate"
    parts: list[RenderableType] = [Text(f"{state['url']}: {word}")]
    lanes = Table("lane", "running", "waiting", "KV used", "blocks", "in tok/s", "out tok/s", "preempted")
    for lane, now in state["lanes"].items():
        earlier = before["lanes"].get(lane) if before else None
        seconds = state["time"] - before["time"] if before else 0.0
        rates = [
            f"{(now.get(name, 0) - earlier.get(name, 0)) / seconds:.0f}" if earlier and seconds > 0 else "–"
            for name in ("prompt tokens", "output tokens")
        ]
        counts = [f"{now.get(name, 0):.0f}" for name in ("running", "waiting")]
        memory = [f"{now.get('kv', 0):.1%}", f"{now.get('blocks', 0):,.0f}"]
        lanes.add_row(lane, *counts, *memory, *rates, f"{now.get('preemptions', 0):.0f}")
    parts.append(lanes)
    if state["serve_problem"]:
        return Group(*parts, Text(state["serve_problem"]))
    stages = Table("deployment", "status", "replicas", "message")
    for name, one in state["deployments"].items():
        replicas = ", ".join(f"{count} {kind.lower()}" for kind, count in one["replicas"].items())
        stages.add_row(name, one["status"], replicas, one["message"])
    return Group(*parts, stages)

"""What a newcomer does first: run config/demo.yaml, ask, look at `serve status`, press Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.harness import REPO, chat, eventually, free_port, haproxy_ports


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`make serve` without make: the demo on free ports, in a Ray instance of its own."""
    port, grpc_port = free_port(), free_port()
    text = (REPO / "config" / "demo.yaml").read_text()
    config = tmp_path / "demo.yaml"
    config.write_text(text.replace("port: 8000", f"port: {port}").replace("port: 9000", f"port: {grpc_port}"))
    command = [sys.executable, "-m", "stagemesh.deployments.cli", "run", str(config)]
    log = (tmp_path / "log").open("w+")
    env = os.environ | haproxy_ports()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
        log.seek(0)
        print(log.read()[-5000:])
        log.close()


@pytest.mark.own_ray
def test_the_demo_answers_shows_its_deployments_running_and_leaves_nothing_behind(
    demo: tuple[str, subprocess.Popen[str]],
) -> None:
    url, process = demo

    def is_ready() -> bool:
        assert process.poll() is None, "it ended"
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200

    eventually(is_ready, 240, "the demo is ready")
    with httpx.Client(base_url=url, timeout=60) as client:
        assert chat(client, "What is 17+25?") == "42"
    serve = Path(sys.executable).with_name("serve")
    status = subprocess.run(
        [serve, "status"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "RAY_AUTH_MODE": "token"},  # a cluster asks for a token unless told otherwise
    ).stdout
    for deployment in ("router:", "stage-0:", "stage-1:"):
        assert deployment in status
    assert status.count("RUNNING: 1") == 3, status
    below = descendants(process.pid)
    assert len(below) > 5
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    assert [pid for pid in below if is_alive(pid)] == []


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid for child in map(int, children) for pid in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

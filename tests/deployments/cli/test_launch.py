"""The launcher around a stand-in for `serve run`: a script that answers /ready and leaves an orphan."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.harness import free_port
from support.model_folder import write_model_folder

from stagemesh.config.errors import ConfigError
from stagemesh.config.serve_yaml import render
from stagemesh.deployments.cli.launch import check_port
from stagemesh.deployments.cli.processes import holder_of_port

SERVE = """
import http.server, signal, subprocess, sys, threading
# As HAProxy: in a session of its own, deaf to SIGTERM, alive after its parent.
orphan = subprocess.Popen(
    [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
     "print(flush=True); time.sleep(600)"],
    start_new_session=True, stdout=subprocess.PIPE,
)
orphan.stdout.readline()
print("orphan", orphan.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("shut down gracefully", flush=True)
"""
LAUNCH = """
import signal, sys
from pathlib import Path
from stagemesh.deployments.cli import launch
launch.END_GRACE_S = 0.5
# As a shell does for what it starts in the background.
signal.signal(signal.SIGINT, signal.SIG_IGN)
launch.serve_command = lambda: sys.argv[2]
sys.exit(launch.launch(Path(sys.argv[1])))
"""


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def launched(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A launcher on its way, its output in a pipe."""
    (tmp_path / "model").mkdir()
    model = write_model_folder(tmp_path / "model")
    config = tmp_path / "serve.yaml"
    config.write_text(render({"model": str(model)}, host="127.0.0.1", port=port, grpc_port=free_port()))
    (tmp_path / "fake_serve.py").write_text(SERVE)
    serve = tmp_path / "serve"
    serve.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/fake_serve.py {port}\n")
    serve.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", LAUNCH, str(config), str(serve)], stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        if process.poll() is None:
            process.terminate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended without {text!r}: {seen}")


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_says_when_it_is_ready_and_leaves_nothing_behind(
    launched: subprocess.Popen[str], port: int, stop: signal.Signals
) -> None:
    seen = read_until(launched, "Ctrl-C stops it")
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in seen
    orphan = int(seen.split("orphan ")[1].split()[0])
    assert is_alive(orphan)
    launched.send_signal(stop)
    assert launched.wait(20) == 0
    assert "shut down gracefully" in read_until(launched, "shut down gracefully")
    assert not is_alive(orphan)
    check_port("port", "127.0.0.1", port)


def test_it_cleans_up_after_a_serve_that_was_killed(launched: subprocess.Popen[str]) -> None:
    seen = read_until(launched, "orphan ")
    orphan = int(seen.split("orphan ")[1])
    serve = int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(serve, signal.SIGKILL)
    assert launched.wait(20) != 0
    assert not is_alive(orphan)


def test_a_taken_port_is_refused_with_its_holder(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        holder = holder_of_port(port)
        assert holder is not None and holder.pid == os.getpid()
        with pytest.raises(ConfigError, match=f"port={port}: is taken by process {os.getpid()}: "):
            check_port("http_options.port", "127.0.0.1", port)
    check_port("http_options.port", "127.0.0.1", port)


def test_a_leftover_haproxy_is_named_with_the_way_to_end_it(port: int) -> None:
    listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(flush=True); time.sleep(60)"
    leftover = subprocess.Popen([sys.executable, "-c", listen, "haproxy"], stdout=subprocess.PIPE)
    with leftover:
        assert leftover.stdout is not None
        leftover.stdout.readline()
        with pytest.raises(ConfigError, match=f"Ray Serve's proxy(.|\n)*kill {leftover.pid}"):
            check_port("http_options.port", "127.0.0.1", port)
        leftover.kill()


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be used on host 192.0.2.1"):
        check_port("http_options.port", "192.0.2.1", free_port())

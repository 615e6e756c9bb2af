"""`serve run` with settings and ports checked first and no process left behind. Imports neither Ray nor torch: fast."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from stagemesh.config.capacity import kv_tokens
from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.generation_config import default_sampling
from stagemesh.config.memory import gib
from stagemesh.config.serve_yaml import ServeFile
from stagemesh.deployments.cli.processes import adopt_orphans, end_descendants, holder_of_port

POLL_PERIOD_S = 0.3
STOP_TIMEOUT_S = 120.0
"""Then Serve is killed."""
END_GRACE_S = 5.0


def launch(path: Path) -> int:
    """Run a Serve config file; returns the exit status.

    SIGINT, SIGTERM and SIGHUP stop Serve gracefully, a second one at once. Raises ConfigError before anything starts.
    """
    file = ServeFile.read(path)
    config = EngineConfig.resolve(EngineArgs.parse(file.args))
    default_sampling(config)
    print(sizes(config), flush=True)
    check_port("http_options.port", file.host, file.port)
    if file.grpc_port is not None:
        check_port("grpc_options.port", file.host, file.grpc_port)
    signals = _count_signals()
    adopt_orphans()
    # In a session of its own, so that a terminal's Ctrl-C reaches it once, from here.
    serve = subprocess.Popen([serve_command(), "run", str(path)], start_new_session=True)
    try:
        is_ready = False
        while serve.poll() is None and not signals:
            if not is_ready and (is_ready := _answers(_url(file, "ready"))):
                print(_greeting(file, config.served_model_names[0]), flush=True)
            time.sleep(POLL_PERIOD_S)
        if serve.poll() is None:
            print("Stopping. Running requests may finish; once more to stop at once.", flush=True)
            serve.send_signal(signal.SIGINT)  # what `serve run` shuts Serve down on
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while serve.poll() is None and len(signals) < 2 and time.monotonic() < deadline:
            time.sleep(POLL_PERIOD_S)
    finally:
        # HAProxy outlives a Serve that was killed, keeps the port and answers clients.
        end_descendants(END_GRACE_S)
    return 0 if signals else serve.wait()


def sizes(config: EngineConfig) -> str:
    """What was asked for or chosen, in one line."""
    own = config.model.max_position_embeddings
    length = f"max_model_len {config.max_model_len:,}"
    if config.max_model_len != own:
        length += f" of the model's {own:,}"
    if (memory := config.kv_cache_memory_bytes) is None:
        return f"{length}; the KV cache is what {config.gpu_memory_utilization:.0%} of each GPU leaves."
    tokens = kv_tokens(config.model, config.plan, config.kv_dtype_bytes, memory, config.block_size)
    return f"{length}; KV cache of {gib(memory)} on each rank, {tokens:,} tokens in each lane."


def check_port(field: str, host: str, port: int) -> None:
    """Raises ConfigError naming the process that listens on `port`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
            return
        except OSError as error:
            reason = f"cannot be used on host {host}: {error.strerror}"
    if (holder := holder_of_port(port)) is not None:
        reason = f"is taken by process {holder.pid}: {holder.command:.200}"
        if "haproxy" in holder.command:
            reason += (
                f"\nThis is Ray Serve's proxy. If Serve is running, stop it with: serve shutdown -y\n"
                f"If not, it was left over when Serve was stopped hard; end it with: kill {holder.pid}"
            )
    raise ConfigError(field, port, reason)


def _count_signals() -> list[int]:
    """A list that grows with every stop signal.

    Call it before the child starts: a child inherits ignored signals (SIGINT in a background job), not handled ones.
    """
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    return signals


def serve_command() -> str:
    """`serve` beside this Python, else on the PATH."""
    beside = Path(sys.executable).with_name("serve")
    command = str(beside) if beside.exists() else shutil.which("serve")
    if command is None:
        raise ConfigError("", None, "Ray's command `serve` is not installed: pip install 'ray[serve]'")
    return command


def _url(file: ServeFile, path: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(file.host, file.host)
    return f"http://{host}:{file.port}{file.route_prefix.rstrip('/')}/{path}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):  # refused, reset, timed out, 503, or not HTTP
        return False


def _greeting(file: ServeFile, model: str) -> str:
    question = {"model": model, "messages": [{"role": "user", "content": "What is 17+25?"}], "temperature": 0}
    grpc = f"gRPC is on port {file.grpc_port}. " if file.grpc_port is not None else ""
    return (
        f"\nstagemesh is ready. Ask it something:\n\n"
        f"  curl {_url(file, 'v1/chat/completions')} \\\n"
        f"    -H 'Content-Type: application/json' \\\n"
        f"    -d '{json.dumps(question)}'\n\n"
        f"{grpc}Ctrl-C stops it.\n"
    )

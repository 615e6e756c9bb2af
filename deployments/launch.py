"""`serve run` with what it leaves to its user: settings checked and ports free beforehand, a first request to try
once it is ready, and nothing left behind. Imports neither Ray nor torch, so that mistakes are told at once."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.serve_yaml import ServeFile
from stagemesh.deployments.processes import adopt_orphans, descendants, end, holder_of_port

POLL_PERIOD_S = 0.3
STOP_TIMEOUT_S = 120.0
"""How long Serve may take to drain and stop before it is ended the hard way."""


def run(path: Path) -> int:
    """Run the Serve config file until it ends or we are told to stop; returns the exit status of `serve run`.

    Ctrl-C, SIGTERM and SIGHUP stop Serve gracefully, a second one at once. Raises ConfigError before anything
    starts when the settings cannot work or a port is taken.
    """
    file = ServeFile.read(path)
    config = EngineConfig.resolve(EngineArgs.parse(file.args))
    for port in (file.port, file.grpc_port):
        if port is not None:
            check_port(file.host, port)
    adopt_orphans()
    stops = 0

    def stop(*_: object) -> None:
        nonlocal stops
        stops += 1

    # Set before the child exists: a handled signal is reset to its default in the child, an ignored one (a shell
    # ignores SIGINT for what it starts in the background) would stay ignored and Serve could not be stopped.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    # Its own session: Ctrl-C in a terminal reaches us alone, and Serve hears of it once.
    child = subprocess.Popen([_serve_command(), "run", str(path)], start_new_session=True)
    try:
        _wait_ready(child, file, config, lambda: stops > 0)
        while child.poll() is None and stops == 0:
            time.sleep(POLL_PERIOD_S)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        if child.poll() is None:
            print("Stopping: running requests may finish. Once more to stop at once.", flush=True)
            child.send_signal(signal.SIGINT)  # the signal on which `serve run` shuts Serve down
        while child.poll() is None and stops < 2 and time.monotonic() < deadline:
            time.sleep(POLL_PERIOD_S)
    finally:
        # Serve's HAProxy outlives a Serve that was stopped hard, and would keep the port and answer clients.
        end(descendants())
    return 0 if stops else child.wait()

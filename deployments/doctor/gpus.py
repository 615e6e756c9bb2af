"""NVIDIA GPUs as the driver and torch see them; torch in a process of its own, and only where there are GPUs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from stagemesh.deployments.doctor.facts import Gpu, Gpus

DRIVER_TIMEOUT_S = 20.0
"""For one nvidia-smi; a GPU that fell off the bus hangs it."""
TORCH_TIMEOUT_S = 90.0
"""To import torch and start CUDA."""
QUERY = "index,name,memory.total,driver_version"
PROBE = """
import json, torch
n = torch.cuda.device_count()
usable = torch.cuda.is_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if usable and torch.distributed.is_nccl_available() else ""
peers = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(n)] for i in range(n)] if usable else []
print(json.dumps({"is_usable": usable, "nccl": nccl, "peers": peers, "cuda": torch.version.cuda or ""}))
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def find_gpus() -> Gpus:
    """Never raises: what goes wrong is in `error`."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Gpus()
    if shutil.which("nvidia-smi") is None:
        return _with_torch(Gpus(error="there are /dev/nvidia* files, but no nvidia-smi: is the driver installed?"))
    try:
        devices, driver = parse_devices(_run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]))
        links = parse_topology(_run(["nvidia-smi", "topo", "-m"])) if len(devices) > 1 else ()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Gpus(error=f"nvidia-smi failed: {error}")
    return _with_torch(Gpus(devices=devices, driver=driver, links=links))


def parse_devices(text: str) -> tuple[tuple[Gpu, ...], str]:
    """Of nvidia-smi --query-gpu=QUERY: the GPUs, and the driver's version. Raises ValueError."""
    devices, driver = [], ""
    for line in text.strip().splitlines():
        index, name, memory_mib, driver = (word.strip() for word in line.split(","))
        # Where GPU and CPU share their memory it is "[N/A]".
        memory_bytes = int(memory_mib) * 2**20 if memory_mib.isdecimal() else 0
        devices.append(Gpu(index=int(index), name=name, memory_bytes=memory_bytes))
    return tuple(devices), driver


def parse_topology(text: str) -> tuple[tuple[str, ...], ...]:
    """The GPUs' part of the matrix of `nvidia-smi topo -m`."""
    rows = [_ESCAPES.sub("", line).split() for line in text.splitlines()]
    num_gpus = sum(bool(re.fullmatch(r"GPU\d+", word)) for word in next((row for row in rows if row), []))
    matrix = [row[1 : 1 + num_gpus] for row in rows if row and re.fullmatch(r"GPU\d+", row[0])]
    # The heading begins with GPU0 too.
    return tuple(tuple(row) for row in matrix if "X" in row)


def _with_torch(gpus: Gpus) -> Gpus:
    environment = dict(os.environ)
    if environment.get("CUDA_VISIBLE_DEVICES") == "":  # how Ray hides GPUs from a task that asks for none
        del environment["CUDA_VISIBLE_DEVICES"]
    try:
        seen: dict[str, Any] = json.loads(_run([sys.executable, "-c", PROBE], TORCH_TIMEOUT_S, environment))
    except (OSError, ValueError, subprocess.SubprocessError) as failure:
        return msgspec.structs.replace(gpus, error=f"torch cannot ask for GPUs: {failure}")
    error = gpus.error or ("" if seen["cuda"] else "this torch is a build for CPUs")
    peers = tuple(tuple(row) for row in seen["peers"])
    return msgspec.structs.replace(gpus, is_usable=seen["is_usable"], nccl=seen["nccl"], peers=peers, error=error)


def _run(command: Sequence[str], timeout_s: float = DRIVER_TIMEOUT_S, environment: dict[str, str] | None = None) -> str:
    """Its output. Raises OSError, or SubprocessError with the last line that it wrote to stderr."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise subprocess.SubprocessError(f"exit status {done.returncode}: {' '.join(last)}")
    return done.stdout

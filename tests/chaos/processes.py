"""The processes of a running application by kind: signals, memory, CPU time, sockets; and what may leak."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from support.harness import Cluster, eventually

from stagemesh.deployments.cli.processes import descendants

OURS = ("worker", "stage", "leader", "router")
TCP_LISTEN = "0A"  # net/tcp_states.h
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_RAY = {
    "raylet": ("raylet",),
    "gcs": ("gcs_server",),
    "haproxy": ("haproxy",),
    "controller": ("ray::ServeController",),
    "proxy": ("ray::ProxyActor", "ray::HAProxyManager"),
    "agent": ("dashboard", "runtime_env/agent", "log_monitor", "monitor.py"),
}


class Listener(NamedTuple):
    pid: int
    host: str
    port: int


def kind_of(command: str) -> str:
    """Of a process by its command line: one of OURS, or a name for a process of Ray's, or ""."""
    title = command.split("\0")[0]
    if title.startswith("ray::ShardWorker"):
        return "worker"
    if title.startswith("ray::ServeReplica:") and ":stage-0" in title:
        return "leader"
    if title.startswith("ray::ServeReplica:") and ":stage-" in title:
        return "stage"
    if title.startswith("ray::ServeReplica:"):
        return "router"
    words = command.replace("\0", " ")
    for kind, parts in _RAY.items():
        if any(part in (title if kind != "agent" else words) for part in parts):
            return kind
    return "ray" if title.startswith("ray::") else ""


_candidates = descendants
"""Pids among which processes are looked for."""


def look_everywhere() -> None:
    """From now on in the whole machine, not below this process only."""
    global _candidates
    _candidates = lambda: [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: E731


def by_kind() -> dict[str, list[int]]:
    """Pids of living processes of the application, Ray's own too."""
    pids = _candidates()
    found: dict[str, list[int]] = {}
    for pid in sorted(pids):
        if state(pid) not in ("", "Z") and (kind := kind_of(_read(pid, "cmdline"))):
            found.setdefault(kind, []).append(pid)
    return found


def ours() -> dict[str, list[int]]:
    """Every kind of OURS, also without a process."""
    found = by_kind()
    return {kind: found.get(kind, []) for kind in OURS}


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def state(pid: int) -> str:
    """R, S, T (stopped), Z, …; "" for none."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return fields[0] if fields else ""


def cpu_s(pid: int) -> float:
    """Seconds of CPU so far, in user and system; 0 for none."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0


def memory_mb(pid: int) -> float:
    """Anonymous resident memory: without libraries and Ray's shared object store."""
    for line in _read(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def memory_by_process() -> dict[str, float]:
    """MB of each process of ours, by "kind pid"."""
    return {f"{kind} {pid}": round(memory_mb(pid), 1) for kind, pids in ours().items() for pid in pids}


def listeners(pid: int) -> list[Listener]:
    """The TCP sockets on which a process listens."""
    inodes = set(_socket_inodes(pid))
    return [Listener(pid, host, port) for inode, host, port in _listening() if inode in inodes]


def num_sockets(pid: int) -> int:
    return sum(1 for _ in _socket_inodes(pid))


@dataclass
class Books:
    """What must be the same before and after: taken of an idle, whole application."""

    processes: dict[str, int]
    listening: dict[str, int]
    sockets: dict[str, int]
    placement_groups: int
    leases: int
    """Open calls at later stages: each is the lease of one lane."""
    lanes: int

    def grown(self, before: Books) -> dict[str, str]:
        """What is more than before, or otherwise not as it was."""
        changes: dict[str, str] = {}
        for name in ("processes", "placement_groups", "leases", "lanes"):
            old, new = getattr(before, name), getattr(self, name)
            if old != new:
                changes[name] = f"{old} -> {new}"
        for kind, count in self.listening.items():
            if count > before.listening.get(kind, 0):
                changes[f"listening sockets of {kind}"] = f"{before.listening.get(kind, 0)} -> {count}"
        return changes


def take_books(cluster: Cluster) -> Books:
    import ray

    processes = ours()
    in_ray = ray.is_initialized()
    tables = ray.util.placement_group_table().values() if in_ray else ()
    return Books(
        processes={kind: len(pids) for kind, pids in processes.items()},
        listening={kind: sum(len(listeners(pid)) for pid in pids) for kind, pids in processes.items()},
        sockets={kind: sum(num_sockets(pid) for pid in pids) for kind, pids in processes.items()},
        placement_groups=sum(table["state"] == "CREATED" for table in tables),
        leases=_open_leases() if in_ray else 0,
        lanes=len(cluster.lanes()),
    )


def settled_books(cluster: Cluster, timeout_s: float) -> Books:
    """`take_books` as soon as the application is ready and idle, and the routers know the lane of every leader."""
    cluster.wait_ready(timeout_s)
    eventually(lambda: len(cluster.lanes()) == len(ours()["leader"]), timeout_s, "the lane of every leader reports")
    eventually(lambda: is_idle(cluster), timeout_s, "the application is idle")
    return take_books(cluster)


def is_idle(cluster: Cluster) -> bool:
    """No request runs or waits, and every block is free."""
    return busy(cluster) == {}


def busy(cluster: Cluster) -> dict[str, float]:
    """What runs, waits or holds blocks, by metric; empty when idle. A metric that is missing counts as -1."""
    metrics = cluster.metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return {name: metrics.get(name, -1.0) for name in names if abs(metrics.get(name, -1.0)) > 1e-9}


def wait_whole(cluster: Cluster, before: Books, timeout_s: float) -> tuple[float, str]:
    """Until processes, lanes and `/ready` are as before. Returns seconds and what is missing ("" for nothing)."""
    started = time.monotonic()
    missing = "?"
    while time.monotonic() - started < timeout_s:
        missing = _missing(cluster, before)
        if not missing:
            break
        time.sleep(0.5)
    return time.monotonic() - started, missing


def _missing(cluster: Cluster, before: Books) -> str:
    counts = {kind: len(pids) for kind, pids in ours().items()}
    try:
        if counts != before.processes:
            return f"processes {counts} instead of {before.processes}"
        if (num := len(cluster.lanes())) != before.lanes:
            return f"{num} lanes instead of {before.lanes}"
        if (status := httpx.get(f"{cluster.url}/ready", timeout=5).status_code) != 200:
            return f"/ready says {status}"
    except (httpx.HTTPError, LookupError) as error:
        return repr(error)
    return ""


def _open_leases() -> int:
    """Ongoing calls of all replicas of later stages, asked from the replicas themselves."""
    import ray

    calls = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        name: str = actor["name"]
        if "#stage-" in name and "#stage-0#" not in name:
            with contextlib.suppress(ValueError):  # gone since
                handle: Any = ray.get_actor(name, namespace=actor["namespace"])
                calls.append(handle.get_num_ongoing_requests.remote())
    ready, _ = ray.wait(calls, num_returns=len(calls), timeout=10) if calls else ([], [])
    return sum(ray.get(call) for call in ready)


def _read(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    return ""


def _socket_inodes(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(link)
                if target.startswith("socket:["):
                    yield target[8:-1]


def _listening() -> list[tuple[str, str, int]]:
    """(inode, host, port) of every listening TCP socket of the machine."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()  # 1: local address:port in hex, 3: state, 9: inode
                if columns[3] == TCP_LISTEN:
                    address, _, port = columns[1].rpartition(":")
                    found.append((columns[9], _host(address), int(port, 16)))
    return found


def _host(address: str) -> str:
    """Of /proc/net/tcp's hex, in host byte order; one that can be connected to."""
    if len(address) == 8:
        host = ".".join(str(byte) for byte in reversed(bytes.fromhex(address)))
        return "127.0.0.1" if host == "0.0.0.0" else host
    if address[:24] == "0000000000000000FFFF0000":  # IPv4 in IPv6
        return _host(address[24:])
    return "127.0.0.1"

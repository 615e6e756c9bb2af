"""Each fault that is planted in the facts of good machines is found, and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.doctor_facts import GIB, good_node

from stagemesh.deployments.doctor.diagnosis import diagnose
from stagemesh.deployments.doctor.facts import (
    Disk,
    Facts,
    Finding,
    Gpu,
    Gpus,
    Link,
    Memory,
    Model,
    Node,
    Port,
    Process,
    Transport,
)

FULL = Disk(path="/tmp/ray", purpose="Ray's temporary files", total_bytes=500 * GIB, free_bytes=9 * GIB)
DOCKER_SHM = Disk(path="/dev/shm", purpose="shared memory", total_bytes=GIB // 16, free_bytes=GIB // 16)
SMALL_SHM = Disk(path="/dev/shm", purpose="shared memory", total_bytes=8 * GIB, free_bytes=8 * GIB)
CONTAINER = Memory(total_bytes=2 * GIB, available_bytes=GIB, is_limited=True)
STRANGER = Port(number=8000, purpose="HTTP", holder=Process(pid=41, command="python -m http.server"))
HAPROXY = Process(pid=42, command="/opt/haproxy -db -f /tmp/haproxy-serve/haproxy.cfg", is_orphan=True)
HELD = Port(number=8000, purpose="HTTP", holder=HAPROXY)
LOOPBACK = Transport(name="gloo", interface="lo", address="127.0.1.1", why="test")
DOCKER = Transport(name="nccl", interface="docker0", address="172.17.0.1", why="test")
NOWHERE = Transport(name="gloo", interface="", address="", why="GLOO_SOCKET_IFNAME=eth9")
VERSIONS = good_node().versions
GPUS = good_node().gpus
SMALLER = Gpu(index=1, name="NVIDIA L4", memory_bytes=23034 * 2**20)


def two_nodes(**changes: Any) -> tuple[Node, ...]:
    """The second with changes."""
    return (good_node(1), good_node(2, **changes))


def gpus(**changes: Any) -> Gpus:
    return msgspec.structs.replace(GPUS, **changes)


def link(**changes: Any) -> Link:
    good = Link(
        kind="p2p",
        transport="nccl",
        places=("a", "b"),
        is_inside_node=True,
        latency_us=12.0,
        bandwidth_gbps=40.0,
    )
    return msgspec.structs.replace(good, **changes)


GIGABIT = link(bandwidth_gbps=0.12, is_inside_node=False)


@pytest.mark.parametrize("num_gpus", [0, 1, 8])
@pytest.mark.parametrize("is_cluster", [False, True])
def test_good_machines_are_clean(num_gpus: int, is_cluster: bool) -> None:
    nodes = tuple(good_node(number, num_gpus) for number in range(1, 4))
    assert diagnose(Facts(nodes=nodes, is_cluster=is_cluster, links=(link(), link()))) == []


@pytest.mark.parametrize(
    "check, level, says, changes",
    [
        ("versions", "error", "ray differ between nodes", {"versions": VERSIONS | {"ray": "2.59.0"}}),
        ("versions", "error", "stagemesh's files differ", {"versions": VERSIONS | {"code": "000000000000"}}),
        ("gpus", "error", "1: NVIDIA L4 22.5 GiB", {"gpus": gpus(devices=(GPUS.devices[0], SMALLER))}),
        ("gpus", "warning", "GPUs 0-1", {"gpus": gpus(peers=((True, False), (False, True)))}),
        ("gpus", "error", "a build for CPUs", {"gpus": gpus(error="this torch is a build for CPUs")}),
        ("drivers", "error", "NCCL differs", {"gpus": gpus(nccl="2.27.0")}),
        ("drivers", "warning", "550.1 on 10.0.0.2", {"gpus": gpus(driver="550.1")}),
        ("interfaces", "error", "gloo takes lo 127.0.1.1", {"transports": (LOOPBACK,)}),
        ("interfaces", "error", "nccl takes docker0", {"transports": (DOCKER,)}),
        ("interfaces", "error", "GLOO_SOCKET_IFNAME=eth9", {"transports": (NOWHERE,)}),
        ("model", "error", "is not on 10.0.0.2", {"model": Model()}),
        ("model", "error", "differs between nodes", {"model": Model(folder="/m", size_bytes=GIB, digest="ff")}),
        ("model", "error", "no index", {"model": Model(folder="/m", error="has no index")}),
        ("clocks", "warning", "-3.0 s off", {"clock_offset_s": -3.0, "clock_error_s": 0.1}),
        ("ports", "error", "process 41: python -m http.server", {"ports": (STRANGER,)}),
        ("leftovers", "error", "process 42, it holds port 8000", {"ports": (HELD,), "processes": (HAPROXY,)}),
        ("leftovers", "warning", "process 7", {"processes": (Process(pid=7, command="ray::ShardWorker"),)}),
        ("haproxy", "error", "no HAProxy", {"haproxy": ""}),
        ("auth", "warning", "off, on private 10.0.0.2", {"has_token_auth": False}),
        ("auth", "error", "off, on public 8.8.4.4", {"has_token_auth": False, "address": "8.8.4.4"}),
        ("shm", "error", "64 MiB free of 64 MiB", {"shm": DOCKER_SHM}),
        ("shm", "warning", "8.0 GiB free", {"shm": SMALL_SHM}),
        ("memory", "error", "container may use 2.0 GiB", {"memory": CONTAINER}),
        ("memory", "warning", "5.0 GiB are free", {"memory": Memory(total_bytes=128 * GIB, available_bytes=5 * GIB)}),
        ("cpus", "warning", "0.5 CPUs for 2 ranks", {"num_cpus": 0.5}),
        ("disk", "error", "9.0 GiB free", {"disks": (FULL,)}),
        ("files", "error", "256 files", {"max_open_files": (256, 256)}),
        ("files", "warning", "1024 files (at most 65536)", {"max_open_files": (1024, 65536)}),
        ("facts", "warning", "ports: PermissionError", {"failures": ("ports: PermissionError",)}),
    ],
)  # fmt: skip
def test_a_planted_fault_is_the_only_finding(check: str, level: str, says: str, changes: dict[str, Any]) -> None:
    (finding,) = diagnose(Facts(nodes=two_nodes(**changes), model="/models/m"))
    assert (finding.check, finding.level) == (check, level)
    assert says in finding.what
    assert finding.why and finding.fix


@pytest.mark.parametrize(
    "says, facts",
    [
        ("10.0.0.9", Facts(nodes=two_nodes(), unreachable={"10.0.0.9": "No module named 'stagemesh'"})),
        ("no node has more than 2 GPUs", Facts(nodes=two_nodes(), tensor_parallel_size=4)),
        ("timed out", Facts(nodes=two_nodes(), links_error="timed out")),
        ("its like have 40.00", Facts(nodes=two_nodes(), links=(link(), link(), link(bandwidth_gbps=12.0)))),
        ("900 µs for a small message", Facts(nodes=two_nodes(), links=(link(latency_us=900.0),))),
        ("0.12 GB/s, less than 0.5", Facts(nodes=two_nodes(), links=(GIGABIT,))),
    ],
)  # fmt: skip
def test_a_fault_between_nodes_is_the_only_finding(says: str, facts: Facts) -> None:
    (finding,) = diagnose(facts)
    assert says in f"{finding.node} {finding.what}"


def only(facts: Facts, check: str) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.check == check]


def test_many_ranks_without_nvlink_are_warned_of() -> None:
    node = good_node(num_gpus=8)
    pcie = tuple(tuple("X" if i == j else "PHB" for j in range(8)) for i in range(8))
    node = msgspec.structs.replace(node, gpus=msgspec.structs.replace(node.gpus, links=pcie))
    assert "NVLink" in only(Facts(nodes=(node,)), "gpus")[0].what
    assert only(Facts(nodes=(node,), tensor_parallel_size=4), "gpus") == []


def test_a_server_in_a_live_cluster_may_hold_its_ports() -> None:
    proxy = msgspec.structs.replace(HAPROXY, is_orphan=False)
    raylet = Process(pid=9, command="/ray/raylet --node")
    node = good_node(ports=(HELD,), processes=(raylet, proxy))
    assert diagnose(Facts(nodes=(node,), is_cluster=True)) == []
    # The same on a machine where a server is about to start.
    assert [finding.check for finding in diagnose(Facts(nodes=(node,)))] == ["ports", "leftovers"]


def test_one_machine_may_talk_to_itself_over_the_loopback() -> None:
    assert diagnose(Facts(nodes=(good_node(transports=(LOOPBACK,), has_token_auth=False),))) == []


def test_a_model_of_the_hub_that_no_node_has_is_fetched() -> None:
    nodes = (good_node(1, model=Model()), good_node(2, model=Model()))
    (finding,) = diagnose(Facts(nodes=nodes, model="org/name"))
    assert finding.level == "warning"


def test_weights_must_fit_into_the_memory_of_a_machine_without_gpus() -> None:
    node = good_node(num_gpus=0, model=Model(folder="/m", size_bytes=120 * GIB, digest="1"))
    assert "weights alone are 120.0 GiB" in only(Facts(nodes=(node,)), "memory")[0].why


def test_errors_come_first() -> None:
    nodes = two_nodes(clock_offset_s=9.0, disks=(FULL,))
    assert [finding.level for finding in diagnose(Facts(nodes=nodes))] == ["error", "warning"]

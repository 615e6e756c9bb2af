"""The facts and links of a live Ray cluster: one small task per node, and one actor per rank that is measured."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stagemesh.deployments.doctor.facts import Link, Node
from stagemesh.deployments.doctor.gather import Places, gather_json
from stagemesh.deployments.doctor.links import Place, measure

CONNECT_TIMEOUT_S = 5.0
INIT_TIMEOUT_S = 60.0
"""To join the cluster; Ray itself would try for minutes."""
GATHER_TIMEOUT_S = 150.0
"""For all nodes together: Ray starts a process on each, and torch is asked for GPUs."""
CLOCK_TIMEOUT_S = 10.0
CLOCK_ROUNDS = 5
"""The shortest round trip bounds the error."""
START_TIMEOUT_S = 60.0
"""For the actors of the ranks; they wait for GPUs that are in use."""
MEASURE_TIMEOUT_S = 240.0


def connect(address: str) -> None:
    """Raises OSError where nothing answers, RuntimeError where versions or tokens differ. Ends the process at the
    deadline: inside `ray.init` nothing can be interrupted."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdecimal() and not address.startswith("ray://"):
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    watchdog = threading.Timer(INIT_TIMEOUT_S, _give_up, [address])
    watchdog.daemon = True
    watchdog.start()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="stagemesh-doctor")
    except ray.exceptions.RayError as error:
        raise RuntimeError(str(error)) from error
    finally:
        watchdog.cancel()


def _give_up(address: str) -> None:
    print(f"error: Ray at {address} let nobody join within {INIT_TIMEOUT_S:g} s", file=sys.stderr, flush=True)
    os._exit(2)


def gather_cluster(places: Places) -> tuple[list[Node], dict[str, str]]:
    """Facts of the living nodes, and why others gave none."""
    tasks = {}
    for node in _living_nodes():
        where = _on(node["NodeID"])
        own = msgspec.structs.replace(places, address=node["NodeManagerAddress"])
        task = ray.remote(gather_json).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        tasks[task.remote(msgspec.json.encode(own))] = node
    _, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=GATHER_TIMEOUT_S)
    nodes, unreachable = [], {}
    for task, node in tasks.items():
        address = node["NodeManagerAddress"]
        if task in late:
            ray.cancel(task, force=True)
            unreachable[address] = f"no facts within {GATHER_TIMEOUT_S:g} s"
            continue
        try:
            facts = msgspec.json.decode(ray.get(task), type=Node)
            offset_s, error_s = _clock(node["NodeID"])
            nodes.append(
                msgspec.structs.replace(facts, ray_id=node["NodeID"], clock_offset_s=offset_s, clock_error_s=error_s)
            )
        except (ray.exceptions.RayError, msgspec.ValidationError, ImportError) as error:
            unreachable[address] = str(error).strip().splitlines()[-1]
    return _with_unique_names(nodes), unreachable


def _living_nodes() -> list[dict[str, Any]]:
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _with_unique_names(nodes: Sequence[Node]) -> list[Node]:
    """Several Ray nodes may share a machine."""
    named: list[Node] = []
    for node in nodes:
        same = sum(other.address == node.address for other in named)
        named.append(msgspec.structs.replace(node, name=f"{node.name} ({same + 1})") if same else node)
    return named


def _now() -> float:
    return time.time()


def _clock(node_id: str) -> tuple[float, float]:
    """A node's clock less ours, and the error of that. Raises RayError."""
    best = (0.0, float("inf"))
    task = ray.remote(_now).options(num_cpus=0, scheduling_strategy=_on(node_id))
    for _ in range(CLOCK_ROUNDS):
        asked_at = time.time()
        there = ray.get(task.remote(), timeout=CLOCK_TIMEOUT_S)
        error_s = (time.time() - asked_at) / 2
        best = min(best, (there - asked_at - error_s, error_s), key=lambda pair: pair[1])
    return best


class LinkRank:
    """One rank of the measurement."""

    def __init__(self) -> None:
        self._store: Any = None

    def open(self, host: str, world_size: int) -> int:
        """Of rank 0: the port of the store."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
        port: int = self._store.port
        return port

    def run(self, places: list[Place], rank: int, host: str, port: int) -> list[Link]:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if self._store is None:
            self._store = TCPStore(host, port, len(places), wait_for_workers=False)
        return measure(places, rank, self._store)


def cluster_places(nodes: Sequence[Node]) -> list[tuple[Place, Node]]:
    """A rank on every GPU, if there are two; else one on each node, and two on a single one."""
    gpus = [
        (Place(node.address, "cuda:0", f"{node.name} GPU {i}"), node)
        for node in nodes
        if node.gpus.is_usable
        for i in range(len(node.gpus.devices))
    ]
    if len(gpus) > 1:
        return gpus
    ranks = list(nodes) if len(nodes) > 1 else [*nodes, *nodes]
    return [(Place(node.address, "cpu", f"{node.name} cpu {i}"), node) for i, node in enumerate(ranks)]


def measure_cluster(nodes: Sequence[Node]) -> list[Link]:
    """Raises RayError, TimeoutError naming who is late."""
    ranks = cluster_places(nodes)
    places = [place for place, _ in ranks]
    actors = [
        ray.remote(LinkRank)
        .options(num_cpus=0, num_gpus=int(place.device != "cpu"), scheduling_strategy=_on(node.ray_id))
        .remote()
        for place, node in ranks
    ]
    try:
        _wait([actor.__ray_ready__.remote() for actor in actors], places, START_TIMEOUT_S, "start: are GPUs in use?")
        host = ranks[0][1].address
        (port,) = _wait([actors[0].open.remote(host, len(actors))], places, START_TIMEOUT_S, "open the store")
        runs = [actor.run.remote(places, rank, host, port) for rank, actor in enumerate(actors)]
        return [link for links in _wait(runs, places, MEASURE_TIMEOUT_S, "measure") for link in links]
    finally:
        for actor in actors:
            ray.kill(actor)


def _wait(calls: list[Any], places: Sequence[Place], timeout_s: float, phase: str) -> list[Any]:
    done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
    if late:
        ray.get(done)  # one that failed is why the others wait
        names = ", ".join(place.label for place, call in zip(places, calls, strict=False) if call in late)
        raise TimeoutError(f"{names} did not {phase} within {timeout_s:g} s")
    return list(ray.get(calls))

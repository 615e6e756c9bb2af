"""Checks of what nodes, GPUs and links are to each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from statistics import median

from stagemesh.deployments.doctor import network
from stagemesh.deployments.doctor.facts import Facts, Finding, Link, Node
from stagemesh.deployments.doctor.node_checks import gib

MAX_CLOCK_SKEW_S = 0.5
"""Steps carry times of their stages, and logs are read side by side: half a second hides what came first."""
MAX_TP_WITHOUT_NVLINK = 4
"""Two all-reduces per layer over PCIe: beyond four ranks they take longer than the layers."""
SLOW_LINK_SHARE = 0.5
"""Of the median of its kind: a cable, a port or a slot at half its width."""
MIN_BANDWIDTH_GBPS = {"between nodes": 0.5, "gloo": 0.2, "nccl": 5.0}
"""Half of 10 Gbit/s; a busy machine's memory; PCIe 3 with eight lanes."""
MAX_LATENCY_US = {"between nodes": 500.0, "gloo": 2000.0, "nccl": 200.0}
"""A step of a small model takes about 10 ms and has two all-reduces per layer."""


def check_versions(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        if missing := [name for name in ("ray", "torch") if node.versions.get(name) == "missing"]:
            yield Finding(
                check="versions",
                level="error",
                node=node.name,
                what=f"{' and '.join(missing)} is not installed",
                why="No rank starts without it.",
                fix="pip install -c constraints.txt -e . in stagemesh's folder",
            )
    for package in sorted({name for node in facts.nodes for name in node.versions}):
        groups = _groups((node.versions.get(package, "missing"), node.name) for node in facts.nodes)
        if len(groups) < 2:
            continue
        thing = "stagemesh's files" if package == "code" else package
        yield Finding(
            check="versions",
            level="error",
            node="",
            what=f"{thing} differ between nodes: {_shown(groups)}",
            why="Lanes never mix versions: a stage on the other node is refused, and Ray itself needs one version.",
            fix="Install the same on every node (pip install -c constraints.txt), then start Ray there anew.",
        )


def check_gpus(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        gpus = node.gpus
        if gpus.error or (gpus.devices and not gpus.is_usable):
            yield Finding(
                check="gpus",
                level="error",
                node=node.name,
                what=gpus.error or "torch sees no GPU that it can use",
                why="Ranks would compute on the CPU, or not start.",
                fix="Compare `nvidia-smi` (driver, GPUs) with torch.version.cuda; install torch's build for it.",
            )
        if (size := facts.tensor_parallel_size or len(gpus.devices)) > 1 and gpus.devices:
            yield from _check_group(node, size)
    devices = {gpu for node in facts.nodes for gpu in node.gpus.devices}
    most = max((len(node.gpus.devices) for node in facts.nodes), default=0)
    if devices and (facts.tensor_parallel_size or 1) > most:
        yield Finding(
            check="gpus",
            level="error",
            node="",
            what=f"tensor_parallel_size={facts.tensor_parallel_size}: no node has more than {most} GPUs",
            why="The ranks of a stage are placed on one node.",
            fix=f"tensor_parallel_size={most} or less, and more stages (pipeline_parallel_size).",
        )
    kinds = _groups(
        (f"{gpu.name} {gib(gpu.memory_bytes)}", node.name) for node in facts.nodes for gpu in node.gpus.devices
    )
    if len(kinds) > 1 and not any(len(_kinds_of(node)) > 1 for node in facts.nodes):
        yield Finding(
            check="gpus",
            level="warning",
            node="",
            what=f"nodes have different GPUs: {_shown(kinds)}",
            why="Stages of equal size wait for the slowest, and the smallest sets the KV cache of all.",
            fix="Give the larger GPUs more layers: pipeline_layer_partition.",
        )


def _kinds_of(node: Node) -> set[tuple[str, int]]:
    return {(gpu.name, gpu.memory_bytes) for gpu in node.gpus.devices}


def _check_group(node: Node, size: int) -> Iterator[Finding]:
    """size: ranks that share a layer; any of the node's GPUs may be theirs."""
    gpus, num_gpus = node.gpus, len(node.gpus.devices)
    if len(_kinds_of(node)) > 1:
        shown = ", ".join(f"{gpu.index}: {gpu.name} {gib(gpu.memory_bytes)}" for gpu in gpus.devices)
        yield Finding(
            check="gpus",
            level="error",
            node=node.name,
            what=f"GPUs of a tensor-parallel group differ: {shown}",
            why="Each layer waits for the slowest, and the smallest memory bounds all.",
            fix="Hide the others (CUDA_VISIBLE_DEVICES where Ray is started), or use stages in place of tensor ranks.",
        )
    pairs = [(i, j) for i in range(num_gpus) for j in range(i)]
    if apart := [f"{j}-{i}" for i, j in pairs if gpus.peers and not gpus.peers[i][j]]:
        yield Finding(
            check="gpus",
            level="warning",
            node=node.name,
            what=f"no peer access between GPUs {', '.join(apart)}",
            why="All-reduces go through the host's memory, at a fraction of the speed.",
            fix="Switch off ACS/IOMMU for these slots, or use stages in place of tensor ranks.",
        )
    has_nvlink = gpus.links and all(gpus.links[i][j].startswith("NV") for i, j in pairs)
    if size > MAX_TP_WITHOUT_NVLINK and gpus.links and not has_nvlink:
        yield Finding(
            check="gpus",
            level="warning",
            node=node.name,
            what=f"{size} tensor-parallel ranks, and not all GPUs are linked by NVLink",
            why=f"Beyond {MAX_TP_WITHOUT_NVLINK} ranks the all-reduces over PCIe take longer than the layers.",
            fix=f"tensor_parallel_size={MAX_TP_WITHOUT_NVLINK} or less, and more stages (pipeline_parallel_size).",
        )


def check_drivers(facts: Facts) -> Iterator[Finding]:
    nodes = [node for node in facts.nodes if node.gpus.devices]
    nccl = _groups((node.gpus.nccl, node.name) for node in nodes if node.gpus.nccl)
    if len(nccl) > 1:
        yield Finding(
            check="drivers",
            level="error",
            node="",
            what=f"NCCL differs between nodes: {_shown(nccl)}",
            why="Ranks of one process group must speak the same NCCL; others hang or fail at the first collective.",
            fix="Install the same torch build on every node.",
        )
    drivers = _groups((node.gpus.driver, node.name) for node in nodes if node.gpus.driver)
    if len(drivers) > 1:
        yield Finding(
            check="drivers",
            level="warning",
            node="",
            what=f"GPU drivers differ between nodes: {_shown(drivers)}",
            why="Kernels may be compiled differently, so that an answer depends on the node that gave it.",
            fix="Install one driver version on every node.",
        )


def check_interfaces(facts: Facts) -> Iterator[Finding]:
    is_shared = len({node.address for node in facts.nodes}) > 1
    for node in facts.nodes:
        for transport in node.transports:
            variable = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}.get(transport.name)
            if not transport.interface:
                what = f"{transport.name} finds no interface ({transport.why})"
            elif is_shared and network.is_local(transport.interface):
                what = f"{transport.name} takes {transport.interface} {transport.address} ({transport.why})"
            else:
                continue
            yield Finding(
                check="interfaces",
                level="error",
                node=node.name,
                what=what,
                why="No other node can be reached over it: the stages of a lane never meet.",
                fix=f"Set {variable} to the interface of {node.address} where Ray is started on this node"
                + (", or let its host name resolve to that address (/etc/hosts)." if variable else ".")
                if variable
                else "Start Ray with --node-ip-address, an address that the other nodes reach.",
            )


def check_clocks(facts: Facts) -> Iterator[Finding]:
    for node in facts.nodes:
        if abs(node.clock_offset_s) - node.clock_error_s > MAX_CLOCK_SKEW_S:
            yield Finding(
                check="clocks",
                level="warning",
                node=node.name,
                what=f"its clock is {node.clock_offset_s:+.1f} s off this machine's",
                why="Times of steps and logs of different nodes cannot be compared.",
                fix="Run chrony or systemd-timesyncd on every node.",
            )


def check_model(facts: Facts) -> Iterator[Finding]:
    models = {node.name: node.model for node in facts.nodes if node.model is not None}
    for name, model in models.items():
        if model.error:
            yield Finding(
                check="model",
                level="error",
                node=name,
                what=f"{model.folder}: {model.error}",
                why="A rank on this node cannot load it.",
                fix="Copy or download it anew.",
            )
    missing = [name for name, model in models.items() if not model.folder]
    if missing:
        is_hub = "/" in (facts.model or "") and not (facts.model or "").startswith(("/", ".", "~"))
        yield Finding(
            check="model",
            level="warning" if is_hub and len(missing) == len(models) else "error",
            node="",
            what=f"{facts.model} is not on {', '.join(missing)}",
            why="Every node that holds a stage reads the weights from its own disk."
            + (" From the hub each fetches them at the first start." if is_hub else ""),
            fix="`hf download` it there first." if is_hub else "Copy the folder to the same path there, or mount it.",
        )
    digests = _groups((f"{m.digest} ({gib(m.size_bytes)})", name) for name, m in models.items() if m.digest)
    if len(digests) > 1:
        yield Finding(
            check="model",
            level="error",
            node="",
            what=f"{facts.model} differs between nodes: {_shown(digests)}",
            why="Stages of different checkpoints are refused: their answer would be that of neither.",
            fix="Copy one folder to all nodes (rsync --checksum), or name a commit of the hub (--revision).",
        )


def check_links(facts: Facts) -> Iterator[Finding]:
    if facts.links_error:
        yield Finding(
            check="links",
            level="error",
            node="",
            what=f"links could not be measured: {facts.links_error}",
            why="The ranks of a lane meet in the same way, and would fail alike.",
            fix="Open all ports between the nodes, see the findings on interfaces, and that the GPUs are not in use.",
        )
    alike: dict[tuple[str, bool, int], list[Link]] = defaultdict(list)
    for link in facts.links:
        alike[link.kind, link.is_inside_node, len(link.places)].append(link)
    for link in facts.links:
        usual = median(other.bandwidth_gbps for other in alike[link.kind, link.is_inside_node, len(link.places)])
        name = f"{link.kind} over {link.transport}, {' – '.join(link.places)}"
        bound = link.transport if link.is_inside_node else "between nodes"
        if link.bandwidth_gbps < SLOW_LINK_SHARE * usual:
            what = f"{name}: {link.bandwidth_gbps:.2f} GB/s, its like have {usual:.2f}"
        elif link.bandwidth_gbps < MIN_BANDWIDTH_GBPS[bound]:
            what = f"{name}: {link.bandwidth_gbps:.2f} GB/s, less than {MIN_BANDWIDTH_GBPS[bound]:g}"
        elif link.latency_us > MAX_LATENCY_US[bound]:
            what = f"{name}: {link.latency_us:.0f} µs for a small message, more than {MAX_LATENCY_US[bound]:g}"
        else:
            continue
        yield Finding(
            check="links",
            level="warning",
            node="",
            what=what,
            why="Every layer waits for all-reduces inside a stage, every step for activations between stages.",
            fix="See which interface is used, its speed (ethtool), and what else runs there. Tensor ranks need the "
            "fastest links; stages can do with the others.",
        )


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names by value."""
    groups: dict[str, list[str]] = defaultdict(list)
    for value, name in pairs:
        if name not in groups[value]:
            groups[value].append(name)
    return dict(groups)


def _shown(groups: dict[str, list[str]]) -> str:
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items())

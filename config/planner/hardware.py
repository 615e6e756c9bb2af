"""GPUs, links and the machines that they make: tables of data sheets, extended by flags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from stagemesh.config.base import did_you_mean
from stagemesh.config.errors import ConfigError

GB = 10**9
FULL_PCIE = 4
"""Cards of a machine that have all PCIe lanes; more share them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One card; rates are dense ones, without sparsity."""

    name: str
    memory_bytes: int
    """In decimal GB, as it is sold: drivers show 1 to 8 % more."""
    bandwidth: float
    """Bytes per second of its memory."""
    flops: Mapping[str, float] = field(hash=False)
    """Per second, by "bf16", "fp8" and "int8"; a missing one computes in bf16."""
    link: str = "pcie4"
    """To the other cards of its machine, where none is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Between two cards of a machine, or between two machines."""

    name: str
    rate: float
    """Bytes per second, each way."""
    latency_s: float
    """Of one hop of a collective, the kernel's launch included."""
    efficiency: float
    """Share of `rate` that large messages reach."""

    @property
    def is_pcie(self) -> bool:
        return self.name.startswith("pcie")

    def send_s(self, num_bytes: float, count: float = 1) -> float:
        """`count` messages of together `num_bytes`."""
        return num_bytes / (self.rate * self.efficiency) + count * self.latency_s

    def collective_s(self, wire_bytes: float, ranks: int, count: float = 1) -> float:
        """`count` ring collectives in which each rank sends `wire_bytes` in all."""
        return wire_bytes / (self.rate * self.efficiency) + count * 2 * (ranks - 1) * self.latency_s


def _gpu(name: str, bandwidth: float, bf16: float, fp8: float, int8: float, link: str) -> Gpu:
    """Memory by the name; GB/s and TFLOP/s."""
    rates = {"bf16": bf16, "fp8": fp8, "int8": int8}
    return Gpu(
        name=name,
        memory_bytes=int(name.rpartition("-")[2].removesuffix("GB")) * GB,
        bandwidth=bandwidth * GB,
        flops={kind: rate * 1e12 for kind, rate in rates.items() if rate},
        link=link,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4-16GB", 320, 65, 0, 130, "pcie3"),
        _gpu("V100-16GB", 900, 125, 0, 0, "pcie3"),
        _gpu("V100-32GB", 900, 125, 0, 0, "pcie3"),
        _gpu("L4-24GB", 300, 121, 242, 242, "pcie4"),
        _gpu("A10G-24GB", 600, 70, 0, 140, "pcie4"),
        _gpu("RTX-3090-24GB", 936, 71, 0, 284, "pcie4"),
        _gpu("RTX-4090-24GB", 1008, 165, 330, 660, "pcie4"),
        _gpu("RTX-5090-32GB", 1792, 209, 419, 838, "pcie5"),
        _gpu("RTX-A6000-48GB", 768, 155, 0, 310, "pcie4"),
        _gpu("RTX-PRO-6000-96GB", 1792, 503, 1007, 1007, "pcie5"),
        _gpu("L40S-48GB", 864, 362, 733, 733, "pcie4"),
        _gpu("A100-40GB", 1555, 312, 0, 624, "nvlink3"),
        _gpu("A100-80GB", 2039, 312, 0, 624, "nvlink3"),
        _gpu("H20-96GB", 4000, 148, 296, 296, "nvlink4"),
        _gpu("H100-80GB", 3350, 989, 1979, 1979, "nvlink4"),
        _gpu("H100-PCIE-80GB", 2000, 756, 1513, 1513, "pcie5"),
        _gpu("H100-NVL-94GB", 3900, 835, 1671, 1671, "pcie5"),
        _gpu("H200-141GB", 4800, 989, 1979, 1979, "nvlink4"),
        _gpu("B200-180GB", 8000, 2250, 4500, 4500, "nvlink5"),
    )
}
"""Manufacturers' data sheets. The CPU is none of them: `--gpus 2xCPU-8GB` stands for ranks on CPUs."""


def _link(name: str, rate: float, latency_us: float, efficiency: float) -> Link:
    return Link(name=name, rate=rate * GB, latency_s=latency_us * 1e-6, efficiency=efficiency)


LINKS = {
    link.name: link
    for link in (
        # Data sheets add both ways: 600 GB/s of an A100 are 300 each way.
        _link("nvlink3", 300, 1, 0.8),
        _link("nvlink4", 450, 1, 0.8),
        _link("nvlink5", 900, 1, 0.8),
        # Lanes are often shared between cards, and traffic may cross the host's bridges.
        _link("pcie3", 16, 4, 0.7),
        _link("pcie4", 32, 3, 0.7),
        _link("pcie5", 64, 3, 0.7),
        _link("1GbE", 0.125, 30, 0.9),
        _link("10GbE", 1.25, 30, 0.9),
        _link("25GbE", 3.125, 30, 0.9),
        _link("100GbE", 12.5, 30, 0.8),
        _link("100GbE-RoCE", 12.5, 5, 0.9),
        _link("200GbE-RoCE", 25, 5, 0.9),
        _link("IB-HDR", 25, 3, 0.9),
        _link("IB-NDR", 50, 3, 0.9),
    )
}
"""Rates each way; latency and efficiency are typical ones of NCCL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    nodes: tuple[tuple[Gpu, ...], ...]
    """The cards of each machine."""
    intra: Link
    inter: Link

    @property
    def num_gpus(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def largest_node(self) -> int:
        return max(map(len, self.nodes))

    @property
    def is_cpu(self) -> bool:
        return any(is_cpu(gpu) for node in self.nodes for gpu in node)

    def slots(self, tp_size: int) -> list[tuple[int, Gpu]]:
        """Places for a stage of `tp_size` equal cards of one machine, machine by machine: (machine, card)."""
        return [
            (index, gpu)
            for index, node in enumerate(self.nodes)
            for gpu, cards in groupby(node)
            for _ in range(len(list(cards)) // tp_size)
        ]

    @property
    def description(self) -> str:
        shapes = [" + ".join(f"{len(list(cards))}x{gpu.name}" for gpu, cards in groupby(node)) for node in self.nodes]
        counts = [(len(list(same)), shape) for shape, same in groupby(shapes)]
        machines = ", ".join(f"{count} machine{'s'[: count > 1]} with {shape}" for count, shape in counts)
        links = f"{self.intra.name} ({self.intra.rate / GB:g} GB/s each way) inside" + (
            f", {self.inter.name} between" if len(self.nodes) > 1 else ""
        )
        return f"{machines}; {links}"


def is_cpu(gpu: Gpu) -> bool:
    return gpu.name.startswith("CPU-")


def find_gpu(name: str, extra: Mapping[str, Gpu]) -> Gpu:
    """By its name, or by its model where that is one size only (L40S). Raises ConfigError."""
    table = {**GPUS, **extra}
    if cpu := re.fullmatch(r"CPU-(\d+)GB", name):
        # Rates of a server's socket; nothing about them is exact.
        rates = {"bf16": 2e12}
        return Gpu(name=name, memory_bytes=int(cpu[1]) * GB, bandwidth=100e9, flops=rates, link="pcie4")
    if name in table:
        return table[name]
    sizes = [key for key in table if key.rpartition("-")[0] == name]
    if len(sizes) == 1:
        return table[sizes[0]]
    if sizes:
        raise ConfigError("gpus", name, f"comes in several sizes: {', '.join(sizes)}")
    reason = f"is not in the table{did_you_mean(name, table)}"
    raise ConfigError("gpus", name, f"{reason}; --gpu-spec '{name}=mem:96,bw:1792,flops:500' adds one")


def find_link(field: str, name: str, extra: Mapping[str, Link]) -> Link:
    """Raises ConfigError."""
    table = {key.lower(): link for key, link in {**LINKS, **extra}.items()}
    if name.lower() not in table:
        known = [link.name for link in table.values()]
        raise ConfigError(field, name, f"is not in the table{did_you_mean(name, known)}; --link NAME=GB/s adds one")
    return table[name.lower()]


def parse_gpu_spec(text: str) -> Gpu:
    """NAME=mem:GB,bw:GB/s,flops:TFLOP/s[,fp8:…][,int8:…][,link:NAME]. Raises ConfigError."""
    name, _, rest = text.partition("=")
    allowed = "must be NAME=mem:GB,bw:GB/s,flops:TFLOP/s, then perhaps fp8:TFLOP/s, int8:TFLOP/s and link:NAME"
    try:
        values = dict(part.split(":") for part in rest.split(","))
        link = values.pop("link", "pcie4")
        numbers = {key: float(value) for key, value in values.items()}
    except ValueError:
        raise ConfigError("gpu_spec", text, allowed) from None
    unknown = numbers.keys() - {"mem", "bw", "flops", "fp8", "int8"}
    if not name or unknown or {"mem", "bw", "flops"} - numbers.keys() or min(numbers.values()) <= 0:
        raise ConfigError("gpu_spec", text, allowed)
    rates = {"bf16": numbers["flops"]} | {kind: numbers[kind] for kind in ("fp8", "int8") if kind in numbers}
    return Gpu(
        name=name,
        memory_bytes=int(numbers["mem"] * GB),
        bandwidth=numbers["bw"] * GB,
        flops={kind: rate * 1e12 for kind, rate in rates.items()},
        link=link,
    )


def parse_link(text: str) -> Link:
    """NAME=GB/s, each way. Raises ConfigError."""
    name, _, rate = text.partition("=")
    try:
        if not name or float(rate) <= 0:
            raise ValueError
    except ValueError:
        raise ConfigError("link", text, "must be NAME=GB/s, e.g. dual25=6.25") from None
    return _link(name, float(rate), 5, 0.8)


def make_cluster(
    gpus: str,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    intra: str | None = None,
    inter: str = "25GbE",
    gpu_specs: Iterable[str] = (),
    links: Iterable[str] = (),
) -> Cluster:
    """gpus: all of them, e.g. "8xL40S-48GB" or "4xA100-80GB,4xL40S-48GB", dealt to machines in order."""
    extra = {gpu.name: gpu for gpu in map(parse_gpu_spec, gpu_specs)}
    cards: list[Gpu] = []
    for part in gpus.split(","):
        match = re.fullmatch(r"(\d+)x(.+)", part.strip())
        if match is None or not 1 <= int(match[1]) <= 4096:
            raise ConfigError("gpus", gpus, "must be COUNTxNAME, or several with commas: 8xL40S-48GB")
        cards += int(match[1]) * [find_gpu(match[2], extra)]
    if nodes is None:
        nodes = 1 if gpus_per_node is None else -(-len(cards) // gpus_per_node)
    each = len(cards) // nodes if gpus_per_node is None else gpus_per_node
    if nodes < 1 or nodes * each != len(cards):
        reason = f"{nodes} machines of {each} are not the {len(cards)} GPUs of {gpus}"
        raise ConfigError("gpus_per_node" if gpus_per_node else "nodes", gpus_per_node or nodes, reason)
    machines = tuple(tuple(cards[start : start + each]) for start in range(0, len(cards), each))
    return cluster_of(machines, intra=intra, inter=inter, links=links)


def cluster_of(
    nodes: tuple[tuple[Gpu, ...], ...], *, intra: str | None = None, inter: str = "25GbE", links: Iterable[str] = ()
) -> Cluster:
    """intra: by default the slowest of the cards' own links. Beyond FULL_PCIE cards in a machine share its lanes."""
    extra = {link.name: link for link in map(parse_link, links)}
    inside = [find_link("intra", intra or gpu.link, extra) for node in nodes for gpu in node]
    slowest = min(inside, key=lambda link: link.rate)
    if slowest.is_pcie:
        slowest = replace(slowest, rate=slowest.rate * min(1.0, FULL_PCIE / max(map(len, nodes))))
    return Cluster(nodes=nodes, intra=slowest, inter=find_link("inter", inter, extra))

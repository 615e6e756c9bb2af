"""What the doctor knows: plain data, gathered on every node, sent as JSON, read by the checks."""

from __future__ import annotations

from typing import Any

import msgspec


class Process(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    command: str
    is_orphan: bool = False
    """No Ray process is above it."""


class Port(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    purpose: str
    holder: Process | None = None
    """Who listens on it; pid 0 = cannot be seen from here, another user's."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """The nearest folder that exists."""
    purpose: str
    total_bytes: int
    free_bytes: int


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    name: str
    memory_bytes: int


class Gpus(msgspec.Struct, frozen=True, kw_only=True):
    devices: tuple[Gpu, ...] = ()
    driver: str = ""
    links: tuple[tuple[str, ...], ...] = ()
    """[i][j]: what lies between two GPUs in the words of `nvidia-smi topo -m` (NV4, PIX, PHB, SYS, …); may be empty."""
    peers: tuple[tuple[bool, ...], ...] = ()
    """[i][j]: GPU i reads GPU j's memory directly; may be empty."""
    nccl: str = ""
    is_usable: bool = False
    """torch can compute on them."""
    error: str = ""


class Transport(msgspec.Struct, frozen=True, kw_only=True):
    """How a transport reaches the other nodes."""

    name: str
    interface: str
    """Empty: there is none."""
    address: str
    why: str


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    total_bytes: int
    """The machine's, or the container's limit where that is less."""
    available_bytes: int
    is_limited: bool = False
    """By a cgroup."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    folder: str = ""
    """Empty: not on this node."""
    size_bytes: int = 0
    digest: str = ""
    error: str = ""
    """Why it cannot be used."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One machine."""

    name: str
    """Its private address in a cluster, else its host name."""
    address: str
    versions: dict[str, str]
    """By package; `code` is the digest of stagemesh's files."""
    gpus: Gpus
    transports: tuple[Transport, ...]
    shm: Disk
    disks: tuple[Disk, ...]
    ports: tuple[Port, ...]
    processes: tuple[Process, ...]
    """Ray's, HAProxy's and stagemesh's; not those of this command."""
    memory: Memory
    num_cpus: float
    """That this process may use; a container's limit may be a fraction."""
    max_open_files: tuple[int, int]
    """Soft and hard limit."""
    haproxy: str
    """Path of the binary; empty: none."""
    has_token_auth: bool
    model: Model | None = None
    """None: no model was named."""
    clock_offset_s: float = 0.0
    """Its clock less that of the machine where the doctor runs."""
    clock_error_s: float = 0.0
    """The offset is known within ± this."""
    ray_id: str = ""
    """In a cluster."""
    failures: tuple[str, ...] = ()
    """What could not be found out."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement between ranks."""

    kind: str
    """all_reduce, or p2p."""
    transport: str
    places: tuple[str, ...]
    """Node and device of each rank."""
    is_inside_node: bool
    latency_us: float
    """A small message: one way, or one all-reduce."""
    bandwidth_gbps: float
    """A large message, in GB/s: one way, or an all-reduce's bus bandwidth, 2 (n-1) / n times its bytes per second."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the checks read."""

    nodes: tuple[Node, ...]
    is_cluster: bool = False
    """A live Ray cluster, rather than this machine before anything starts."""
    unreachable: dict[str, str] = {}
    """Nodes that gave no facts, and why."""
    tensor_parallel_size: int | None = None
    """None: all GPUs of a node."""
    model: str | None = None
    links: tuple[Link, ...] = ()
    links_error: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    check: str
    level: str
    """error: something will not work; warning: it will, but badly or by chance."""
    node: str
    """Empty: between nodes."""
    what: str
    why: str
    fix: str


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value)

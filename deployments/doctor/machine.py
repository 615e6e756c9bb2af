"""A machine's limits, disks, ports and processes, from /proc and /sys of Linux. Errors are OSError and ValueError."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import msgspec

from stagemesh.deployments.doctor.facts import Disk, Memory, Port, Process

CGROUP_ROOT = Path("/sys/fs/cgroup")
TCP_LISTEN = "0A"  # net/tcp_states.h
UNLIMITED = 2**60
"""cgroup v1 says so, within a page, where v2 says `max`."""


def memory() -> Memory:
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    total, available = values["MemTotal"], values["MemAvailable"]
    limit, used = cgroup_memory()
    if limit >= total:
        return Memory(total_bytes=total, available_bytes=available)
    return Memory(total_bytes=limit, available_bytes=min(available, max(0, limit - used)), is_limited=True)


def cgroup_memory() -> tuple[int, int]:
    """The lowest limit of the cgroups around this process, and what is used under it."""
    limits = [(UNLIMITED, 0)]
    for folder in _cgroup_folders("memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(FileNotFoundError):
                limit = (folder / limit_file).read_text().strip()
                if limit != "max":
                    limits.append((int(limit), int((folder / used_file).read_text())))
    return min(limits)


def num_cpus() -> float:
    limits = [float(len(os.sched_getaffinity(0)))]
    for folder in _cgroup_folders("cpu"):
        with contextlib.suppress(FileNotFoundError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                limits.append(int(quota) / int(period))
        with contextlib.suppress(FileNotFoundError):
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                limits.append(quota_us / int((folder / "cpu.cfs_period_us").read_text()))
    return min(limits)


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's cgroup and those above it; of v2, or of v1 under the controller's name."""
    folders = [CGROUP_ROOT, CGROUP_ROOT / controller]
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", controller):
                place = CGROUP_ROOT / controllers / path.lstrip("/")
                folders += [place, *(p for p in place.parents if p.is_relative_to(CGROUP_ROOT))]
    return folders


def max_open_files() -> tuple[int, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return tuple(UNLIMITED if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))  # type: ignore[return-value]


def disk(path: Path, purpose: str) -> Disk:
    """Of the file system that holds `path`, or will."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    size = stat.f_frsize
    return Disk(path=str(path), purpose=purpose, total_bytes=stat.f_blocks * size, free_bytes=stat.f_bavail * size)


def processes() -> tuple[Process, ...]:
    """Those of Ray, its HAProxy and stagemesh; not this one and what it started."""
    commands: dict[int, list[str]] = {}
    parents: dict[int, int] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            words = [word.decode(errors="replace") for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
            # "pid (name) state ppid …"; the name may hold anything, so count from its closing bracket
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                commands[pid], parents[pid] = words, int(parent)
    return tuple(
        Process(
            pid=pid,
            command=" ".join(words).strip()[:200],
            is_orphan=not any(_is_ray(commands.get(above, [])) for above in _line(pid, parents)[1:]),
        )
        for pid, words in sorted(commands.items())
        if os.getpid() not in _line(pid, parents) and (_is_ray(words) or is_haproxy(words) or _is_stagemesh(words))
    )


def _line(pid: int, parents: dict[int, int]) -> list[int]:
    """A process and those above it; not init, which all have in common."""
    line = []
    while pid > 1 and pid not in line:
        line.append(pid)
        pid = parents.get(pid, 0)
    return line


def _is_ray(words: list[str]) -> bool:
    if not words:
        return False
    is_titled = words[0].startswith(("ray::", "ray-dashboard"))
    is_server = any("/ray/dashboard/" in word or word.startswith("ray.util.client") for word in words[1:5])
    return is_titled or is_server or os.path.basename(words[0]) in ("raylet", "gcs_server")


def is_haproxy(words: list[str]) -> bool:
    """Ray Serve's; a HAProxy of somebody else has its settings elsewhere."""
    settings = os.environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "haproxy-serve")
    return bool(words) and os.path.basename(words[0]) == "haproxy" and any(settings in word for word in words[1:])


def _is_stagemesh(words: list[str]) -> bool:
    names = [os.path.basename(word) for word in words[:2]]
    is_command = "stagemesh" in names or "stagemesh.deployments.cli" in words[1:3]
    return is_command and bool({"serve", "run"} & set(words[1:5]))


def ports(purposes: dict[int, str]) -> tuple[Port, ...]:
    """Who listens on each of these TCP ports."""
    holders = {
        number: msgspec.structs.replace(holder, command=holder.command[:200])
        for number, holder in holders_of_ports(set(purposes)).items()
    }
    return tuple(Port(number=number, purpose=what, holder=holders.get(number)) for number, what in purposes.items())


def holders_of_ports(numbers: set[int]) -> dict[int, Process]:
    """Those of these TCP ports that somebody listens on; pid 0 for another user's."""
    inodes = _listening(numbers)
    holders: dict[int, Process] = {}
    for pid in _pids() if inodes else ():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if (number := inodes.get(os.readlink(link))) is not None:
                        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                        process = Process(pid=pid, command=command.decode(errors="replace").strip())
                        holders.setdefault(number, process)
    for number in set(inodes.values()) - set(holders):
        holders[number] = Process(pid=0, command="a process of another user")
    return holders


def _listening(numbers: set[int]) -> dict[str, int]:
    """Ports by the name of their socket's file descriptor."""
    inodes = {}
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(FileNotFoundError):
            for line in table.read_text().splitlines()[1:]:
                columns = line.split()  # 1: local address:port in hex, 3: state, 9: inode
                number = int(columns[1].rpartition(":")[2], 16)
                if columns[3] == TCP_LISTEN and number in numbers:
                    inodes[f"socket:[{columns[9]}]"] = number
    return inodes


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]

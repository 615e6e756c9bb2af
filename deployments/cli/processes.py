"""Child processes and holders of ports, from Linux's /proc; elsewhere none."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_TCP_LISTEN = "0A"  # net/tcp_states.h


class Process(NamedTuple):
    pid: int
    command: str


def adopt_orphans() -> None:
    """A process below this one becomes its child, not init's, when its parent dies."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[int]:
    """Pids of living processes below this one."""
    children = defaultdict(list)
    for pid in _pids():
        with contextlib.suppress(OSError, ValueError):
            # "pid (name) state ppid …"; the name may hold anything, so count from its closing bracket
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children[int(parent)].append(pid)
    pids, parents = [], [os.getpid()]
    while parents:
        below = children[parents.pop()]
        pids += below
        parents += below
    return pids


def end_descendants(grace_s: float) -> None:
    """Terminate all descendants; kill those that live `grace_s` seconds later."""
    _signal(descendants(), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (alive := descendants()) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal(alive, signal.SIGKILL)


def holder_of_port(port: int) -> Process | None:
    """The process that listens on a TCP port; None for another user's."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for pid in _pids():
        with contextlib.suppress(OSError):
            if any(os.readlink(link) in sockets for link in Path(f"/proc/{pid}/fd").iterdir()):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return Process(pid, command.strip())
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()  # 1: local address:port in hex, 3: state, 9: inode
                if columns[3] == _TCP_LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    yield columns[9]


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return []


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

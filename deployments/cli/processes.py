"""Child processes and holders of ports, from Linux's /proc; elsewhere none."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

from stagemesh.deployments.doctor.facts import Process
from stagemesh.deployments.doctor.machine import holders_of_ports

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


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
    with contextlib.suppress(OSError):
        holder = holders_of_ports({port}).get(port)
        return holder if holder is not None and holder.pid else None
    return None


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return []


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

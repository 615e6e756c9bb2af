"""Mixed streams beside SIGKILL and SIGSTOP of workers, stage replicas and leaders: no answer may be lost or changed."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from typing import Any

from chaos.judging import judge_idle, judge_traffic
from chaos.processes import Books, ours, send, settled_books, state, take_books, wait_whole
from chaos.report import Report
from chaos.traffic import Traffic, asks
from support.harness import Cluster

VICTIMS = ("worker", "stage", "leader")
WHOLE_TIMEOUT_S = 180.0
"""Two busy cores start a leader in 5 to 15 s, and there may be several to start."""


def run(
    cluster: Cluster,
    *,
    streams: int = 16,
    seconds: float = 180.0,
    every_s: float = 10.0,
    stops: bool = True,
    variants: int = 3,
    max_tokens: int = 96,
    seed: int = 0,
) -> Report:
    """A kill every `every_s`; with `stops` also one SIGSTOP of each kind, spread over the time and never continued.

    The first three kills are one of each kind.
    """
    report = Report("chaos")
    before = settled_books(cluster, WHOLE_TIMEOUT_S)
    traffic = Traffic(cluster.url, asks(variants, max_tokens), streams, seed)
    rng = random.Random(seed)
    signals = _schedule(rng, seconds, every_s, stops)
    sent: list[dict[str, Any]] = []
    stopped: list[int] = []
    started = time.monotonic()
    with traffic:
        for at_s, kind, number in signals:
            time.sleep(max(0.0, started + at_s - time.monotonic()))
            pid = _pick(rng, kind)
            if pid is not None:
                send(pid, number)
                if number == signal.SIGSTOP:
                    stopped.append(pid)
            sent.append({"at_s": round(time.monotonic() - started, 1), "kind": kind, "signal": number.name, "pid": pid})
        time.sleep(max(0.0, started + seconds - time.monotonic()))
    report.data["ended_s"] = round(time.monotonic() - started - seconds, 1)
    _settle(cluster, before, report)
    fingerprints = judge_traffic(report, traffic)["fingerprints"]
    left = [pid for pid in stopped if state(pid) == "T"]
    for pid in left:
        send(pid, signal.SIGKILL)
    report.data |= {
        "signals": dict(Counter(f"{s['signal']} {s['kind']}" + ("" if s["pid"] else " (none alive)") for s in sent)),
        "sent": sent,
        "before": before,
    }
    report.check(all(any(s["kind"] == kind and s["pid"] for s in sent) for kind in VICTIMS), "every kind was hit", sent)
    report.check(left == [], "no stopped process is left behind", left)
    report.check(len(fingerprints) == 1 and fingerprints != ["None"], "answers have one fingerprint", fingerprints)
    return report


def _settle(cluster: Cluster, before: Books, report: Report) -> None:
    """Whole and idle again, with nothing left over."""
    took_s, missing = wait_whole(cluster, before, WHOLE_TIMEOUT_S)
    report.data["whole_after_s"] = round(took_s, 1)
    report.check(missing == "", "everything is whole again", missing)
    judge_idle(report, cluster)
    time.sleep(2.0)  # sockets of ended calls close
    after = take_books(cluster)
    report.data["after"] = after
    grown = after.grown(before)
    report.check(grown == {}, "nothing leaked", grown)


def _schedule(
    rng: random.Random, seconds: float, every_s: float, stops: bool
) -> list[tuple[float, str, signal.Signals]]:
    """(seconds from the start, kind, signal), in order of time."""
    first = list(VICTIMS)
    rng.shuffle(first)
    times = [every_s * (i + 1) for i in range(int((seconds - every_s / 4) / every_s))]
    kills = [(at, first[i] if i < 3 else rng.choice(VICTIMS), signal.SIGKILL) for i, at in enumerate(times)]
    halts = [(seconds * (i + 1) / 4 + every_s / 2, kind, signal.SIGSTOP) for i, kind in enumerate(VICTIMS)]
    return sorted(kills + (halts if stops else []))


def _pick(rng: random.Random, kind: str) -> int | None:
    """A process of that kind that runs; waits a while where all of them are being replaced."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        pids = [pid for pid in ours()[kind] if state(pid) not in ("T", "")]
        if pids:
            return rng.choice(pids)
        time.sleep(0.2)
    return None

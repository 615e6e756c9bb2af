"""CPU time of every process of an idle application."""

from __future__ import annotations

import time

from chaos.processes import OURS, by_kind, cpu_s, is_idle
from chaos.report import Report
from support.harness import Cluster, eventually

MOST_PERCENT = 5.0
"""Of one core, by all processes of ours together."""


def run(cluster: Cluster, seconds: float = 60.0, most_percent: float = MOST_PERCENT) -> Report:
    report = Report("idle")
    eventually(lambda: is_idle(cluster), 30, "the application is idle")
    time.sleep(1)  # the last requests' ends
    before = {(kind, pid): cpu_s(pid) for kind, pids in by_kind().items() for pid in pids}
    time.sleep(seconds)
    percent: dict[str, float] = {}
    for (kind, pid), used_s in before.items():
        percent[kind] = percent.get(kind, 0.0) + max(0.0, cpu_s(pid) - used_s) / seconds * 100
    ours = sum(percent.get(kind, 0.0) for kind in OURS)
    report.data |= {
        "seconds": seconds,
        "percent_of_one_core": {kind: round(value, 2) for kind, value in percent.items()},
        "ours_percent": round(ours, 2),
    }
    report.check(any(kind in percent for kind in OURS), "processes of ours are found")
    report.check(ours < most_percent, f"ours use less than {most_percent:g} % of one core when idle", round(ours, 2))
    haproxy = percent.get("haproxy", 0.0)
    report.check(haproxy < 20, "HAProxy does not spin", round(haproxy, 1))
    return report

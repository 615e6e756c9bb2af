"""CPU time of every process of an idle application.

Ray's runtime takes part of it in every process that it starts, also in one that does nothing: two of those are started
beside the application, and what they use is reported and told apart.
"""

from __future__ import annotations

import os
import time

import ray
from chaos.processes import OURS, by_kind, cpu_s, is_idle
from chaos.report import Report
from support.harness import Cluster, eventually

MOST_PERCENT = 5.0
"""Of one core, by all processes of ours together, beyond what Ray's runtime uses in as many that do nothing."""
NUM_BARE = 2


def run(cluster: Cluster, seconds: float = 60.0, most_percent: float = MOST_PERCENT) -> Report:
    report = Report("idle")
    eventually(lambda: is_idle(cluster), 30, "the application is idle")
    time.sleep(1)  # the last requests' ends

    class Bare:  # here, so that it travels by value: actors cannot import this module
        def pid(self) -> int:
            return os.getpid()

    bare = [ray.remote(num_cpus=0)(Bare).remote() for _ in range(NUM_BARE)]
    bare_pids = [ray.get(actor.pid.remote()) for actor in bare]
    time.sleep(5)  # they have just started
    bare_before = [cpu_s(pid) for pid in bare_pids]
    before = {(kind, pid): cpu_s(pid) for kind, pids in by_kind().items() for pid in pids}
    time.sleep(seconds)
    percent: dict[str, float] = {}
    for (kind, pid), used_s in before.items():
        percent[kind] = percent.get(kind, 0.0) + max(0.0, cpu_s(pid) - used_s) / seconds * 100
    used_by_bare = sum(cpu_s(pid) - used_s for pid, used_s in zip(bare_pids, bare_before, strict=True))
    for actor in bare:
        ray.kill(actor)
    runtime = used_by_bare / NUM_BARE / seconds * 100
    num_ours = sum(kind in OURS for kind, _ in before)
    ours = sum(percent.get(kind, 0.0) for kind in OURS)
    report.data |= {
        "seconds": seconds,
        "percent_of_one_core": {kind: round(value, 2) for kind, value in percent.items()},
        "ours_percent": round(ours, 2),
        "ray_runtime_percent_of_each": round(runtime, 2),
        "num_ours": num_ours,
    }
    ours -= runtime * num_ours
    report.check(any(kind in percent for kind in OURS), "processes of ours are found")
    report.check(ours < most_percent, f"ours use less than {most_percent:g} % of one core when idle", round(ours, 2))
    haproxy = percent.get("haproxy", 0.0)
    report.check(haproxy < 20, "HAProxy does not spin", round(haproxy, 1))
    return report

"""Lanes that stop on purpose under load, with less time to drain than an answer takes: nothing may be lost."""

from __future__ import annotations

import time

from chaos.judging import judge_idle, judge_ready, judge_traffic
from chaos.processes import ours, settled_books, take_books, wait_whole
from chaos.report import Report
from chaos.traffic import Traffic, asks
from support.harness import DEMO_POOL, Cluster, eventually

DRAIN_TIMEOUT_S = 2.0
"""Far less than a long answer takes: what still runs then must be handed over."""
POOL = {**DEMO_POOL, "downscale_delay_s": 4}
LONG_ANSWER = 400
"""Tokens."""


def run_scale_down(cluster: Cluster) -> Report:
    """Needs `POOL` as the autoscaling_config: many streams bring a second lane, few take it away."""
    report = Report("scale-down")
    with Traffic(cluster.url, asks(1, 48), 16) as crowd:
        eventually(lambda: len(cluster.lanes()) == 2, 200, "a second lane")
        time.sleep(5)
    few = Traffic(cluster.url, asks(1, LONG_ANSWER), 4, seed=1)
    with few:
        started = time.monotonic()
        try:
            eventually(lambda: len(cluster.lanes()) == 1, 120, "one lane, with streams that go on")
        except TimeoutError as error:
            report.check(False, "the second lane goes", error)
        report.data["one_lane_after_s"] = round(time.monotonic() - started, 1)
        time.sleep(5)
    judge_idle(report, cluster)
    for name, traffic in (("crowd", crowd), ("few", few)):
        report.data[name] = judge_traffic(report, traffic)
    judge_ready(report, cluster)
    return report


def run_replace(cluster: Cluster, *, streams: int = 8) -> Report:
    """Serve replaces every replica, for a setting that changes no answer.

    Needs two routers, so that one always listens, and time to drain for the longest answer: a router that goes earlier
    takes its connections with it.
    """
    from ray import serve

    from stagemesh.deployments.app import build

    report = Report("replace")
    assert cluster.args is not None, "replacing needs an application that was deployed here"
    before = settled_books(cluster, 120)
    old = {pid for pids in ours().values() for pid in pids}
    traffic = Traffic(cluster.url, asks(1, LONG_ANSWER // 4), streams)
    cluster.args = {**cluster.args, "drain_timeout_s": cluster.args["drain_timeout_s"] + 1}
    with traffic:
        time.sleep(3)
        serve.run(build(cluster.args), name="stagemesh", route_prefix="/")
        time.sleep(5)
    whole_s, missing = wait_whole(cluster, before, 120)
    report.check(missing == "", "everything is whole again", missing)
    still = [pid for pids in ours().values() for pid in pids if pid in old]
    report.data |= {"whole_after_s": round(whole_s, 1), "processes_kept": len(still)}
    report.check(len(still) < len(old), "replicas were replaced")
    judge_idle(report, cluster)
    grown = take_books(cluster).grown(before)
    report.check(grown == {}, "nothing leaked", grown)
    judge_traffic(report, traffic)
    return report

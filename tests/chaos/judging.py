"""What every attack checks of the application afterwards."""

from __future__ import annotations

from typing import Any

import httpx
from chaos.processes import busy, is_idle
from chaos.report import Report
from chaos.traffic import Traffic
from support.harness import Cluster, eventually


def judge_traffic(report: Report, traffic: Traffic) -> dict[str, Any]:
    """Everything was answered, and with the undisturbed text. Asks again for what chose its own seed."""
    traffic.compare()
    summary = traffic.summary()
    report.data["traffic"] = summary
    report.check(summary["requests"] > 0, "requests were made")
    report.check(summary["failed"] == 0, f"no request fails ({summary['failed']} did)", summary["failures"])
    report.check(summary["wrong"] == 0, f"no text changes ({summary['wrong']} did)", summary["wrong_kinds"])
    compared = sum(result.is_right is not None for result in traffic.results)
    report.check(compared == summary["requests"] - summary["failed"], "every answer was compared", compared)
    return summary


def judge_idle(report: Report, cluster: Cluster, timeout_s: float = 60.0) -> bool:
    try:
        eventually(lambda: is_idle(cluster), timeout_s, "no request runs or waits and every block is free")
    except TimeoutError as error:
        report.check(False, "the application is idle afterwards", f"{error}; {_busy(cluster)}")
        return False
    return True


def _busy(cluster: Cluster) -> str:
    try:
        return str(busy(cluster))
    except httpx.HTTPError as error:
        return repr(error)


def judge_ready(report: Report, cluster: Cluster) -> None:
    try:
        said = httpx.get(f"{cluster.url}/ready", timeout=10).status_code
    except httpx.HTTPError as error:
        report.check(False, "/ready is answered", repr(error))
    else:
        report.check(said == 200, "/ready says 200", said)


def judge_growth(report: Report, before: dict[str, float], after: dict[str, float], most_mb: float) -> None:
    """before, after: MB by process."""
    report.check(set(after) == set(before), "no process died", sorted(set(before) ^ set(after)))
    grown = {name: round(after[name] - before[name], 1) for name in after if name in before}
    report.data["memory_grown_mb"] = grown
    large = {name: mb for name, mb in grown.items() if mb > most_mb}
    report.check(large == {}, f"no process grows by more than {most_mb:g} MB", large)

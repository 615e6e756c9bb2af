"""All checks, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from stagemesh.deployments.doctor import cluster_checks, node_checks
from stagemesh.deployments.doctor.facts import Facts, Finding

CHECKS: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    node_checks.check_facts_are_complete,
    cluster_checks.check_versions,
    cluster_checks.check_gpus,
    cluster_checks.check_drivers,
    cluster_checks.check_interfaces,
    cluster_checks.check_links,
    cluster_checks.check_model,
    cluster_checks.check_clocks,
    node_checks.check_ports,
    node_checks.check_leftovers,
    node_checks.check_haproxy,
    node_checks.check_token_auth,
    node_checks.check_shared_memory,
    node_checks.check_memory,
    node_checks.check_cpus,
    node_checks.check_disks,
    node_checks.check_open_files,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Errors first, then in the order of CHECKS."""
    findings = [finding for check in CHECKS for finding in check(facts)]
    return sorted(findings, key=lambda finding: finding.level != "error")

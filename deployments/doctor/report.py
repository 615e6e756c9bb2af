"""The doctor's report, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagemesh.deployments.doctor.facts import Facts, Finding, Node, to_plain
from stagemesh.deployments.doctor.node_checks import gib

COLORS = {"error": "red", "warning": "yellow"}


def exit_status(findings: Sequence[Finding]) -> int:
    return int(any(finding.level == "error" for finding in findings))


def as_json(facts: Facts, findings: Sequence[Finding]) -> str:
    report = {"exit_status": exit_status(findings), "findings": to_plain(list(findings)), "facts": to_plain(facts)}
    return json.dumps(report, indent=2, ensure_ascii=False)


def show(facts: Facts, findings: Sequence[Finding], console: Console) -> None:
    for node in facts.nodes:
        console.print(_node_table(node))
    if facts.links:
        console.print(_links_table(facts))
    for finding in findings:
        color = COLORS[finding.level]
        console.print()
        console.print(
            Text.assemble(
                (finding.level, f"bold {color}"), f" {finding.check}", f" · {finding.node}" * bool(finding.node)
            )
        )
        # Text and not markup: a command line may hold square brackets.
        for name, text in (("what", finding.what), ("why", finding.why), ("do", finding.fix)):
            console.print(Text.assemble((f"  {name:<5}", "bold"), text), soft_wrap=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in COLORS}
    console.print()
    if findings:
        console.print(", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n))
    else:
        console.print(Text(f"No findings on {len(facts.nodes)} node{'s' * (len(facts.nodes) != 1)}.", style="green"))


def _node_table(node: Node) -> Table:
    table = Table(title=f"{node.name}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(node):
        table.add_row(name, Text(value))
    return table


def _rows(node: Node) -> list[tuple[str, str]]:
    gpus, memory, (soft, hard) = node.gpus, node.memory, node.max_open_files
    cards = [f"{gpu.index}: {gpu.name} {gib(gpu.memory_bytes)}" for gpu in gpus.devices]
    taken = [f"{port.number} {port.holder.command:.40}" for port in node.ports if port.holder is not None]
    rows = [
        ("versions", " · ".join(f"{name} {version}" for name, version in node.versions.items())),
        ("CPUs, memory", f"{node.num_cpus:g} · {gib(memory.available_bytes)} free of {gib(memory.total_bytes)}"),
        ("GPUs", " · ".join([*cards, f"driver {gpus.driver}", f"NCCL {gpus.nccl or '–'}"]) if cards else "none"),
        ("interfaces", " · ".join(f"{t.name} {t.interface or '–'} {t.address}" for t in node.transports)),
        ("shared memory", f"{gib(node.shm.free_bytes)} free of {gib(node.shm.total_bytes)}"),
        ("disks", " · ".join(f"{disk.path} {gib(disk.free_bytes)} free" for disk in node.disks)),
        ("open files", f"{soft}, at most {hard}"),
        ("ports taken", " · ".join(taken) or "none"),
        ("HAProxy", node.haproxy or "none"),
        ("Ray's token", "asked for" if node.has_token_auth else "not asked for"),
    ]
    if node.model is not None:
        rows.append(("model", f"{node.model.folder or 'missing'} {gib(node.model.size_bytes)} {node.model.digest}"))
    if node.ray_id:
        rows.append(("clock", f"{node.clock_offset_s * 1e3:+.1f} ms, ± {node.clock_error_s * 1e3:.1f}"))
    return rows


def _links_table(facts: Facts) -> Table:
    table = Table(title="links", title_justify="left", title_style="bold")
    for column in ("what", "over", "between"):
        table.add_column(column)
    for column in ("small message", "large message"):
        table.add_column(column, justify="right")
    for link in facts.links:
        places = Text(" – ".join(link.places))
        table.add_row(link.kind, link.transport, places, f"{link.latency_us:.0f} µs", f"{link.bandwidth_gbps:.2f} GB/s")
    return table

"""What a part found: measurements, and which of the things that must hold did."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    part: str
    data: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    """What should have held and did not, with what was seen."""

    def check(self, holds: bool, what: str, seen: object = "") -> None:
        """Note a thing that must hold; `what` says it as a sentence."""
        if not holds:
            self.failed.append(f"{what}: {seen}" if seen != "" else what)

    def __str__(self) -> str:
        return json.dumps({"part": self.part, "failed": self.failed, **self.data}, indent=2, default=str)


def spread(values: list[float], unit: float = 1.0, digits: int = 3) -> dict[str, float]:
    """p50, p99 and the largest, times `unit`; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    quantiles = {"p50": ordered[round(0.5 * last)], "p99": ordered[round(0.99 * last)], "max": ordered[last]}
    return {name: round(value * unit, digits) for name, value in quantiles.items()}

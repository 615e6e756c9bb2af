"""Links of this machine, measured by processes of its own: one per GPU, or two on the CPU. No Ray."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stagemesh.deployments.doctor.facts import Link, Node
from stagemesh.deployments.doctor.links import Place, measure

TIMEOUT_S = 180.0
"""For all of it: imports of torch, meeting, exercises."""
POLL_PERIOD_S = 0.05


def places_of(node: Node) -> list[Place]:
    """A rank on each GPU; where there are not two, two ranks on the CPU."""
    num_gpus = len(node.gpus.devices) if node.gpus.is_usable else 0
    if num_gpus > 1:
        return [Place(node.name, f"cuda:{i}", f"{node.name} cuda:{i}") for i in range(num_gpus)]
    return [Place(node.name, "cpu", f"{node.name} cpu {i}") for i in range(2)]


def measure_here(places: Sequence[Place], timeout_s: float = TIMEOUT_S) -> list[Link]:
    """Raises RuntimeError with the last words of the rank that failed, TimeoutError naming those that are not done."""
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="stagemesh-doctor-") as folder:
        work = Path(folder)
        (work / "places").write_bytes(msgspec.json.encode(list(places)))
        ranks = []
        try:
            for rank in range(len(places)):
                with (work / f"log-{rank}").open("wb") as log:
                    ranks.append(
                        subprocess.Popen([sys.executable, "-m", __name__, folder, str(rank)], stdout=log, stderr=log)
                    )
            while (codes := [rank.poll() for rank in ranks]) and None in codes and not any(codes):
                if time.monotonic() > deadline:
                    slow = ", ".join(place.label for place, code in zip(places, codes, strict=True) if code is None)
                    raise TimeoutError(f"not done within {timeout_s:g} s: {slow}")
                time.sleep(POLL_PERIOD_S)
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                raise RuntimeError(f"{places[failed].label}: {_last_line(work / f'log-{failed}')}")
            return [
                link
                for rank in range(len(places))
                for link in msgspec.json.decode((work / f"links-{rank}").read_bytes(), type=list[Link])
            ]
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"


def _run_rank(work: Path, rank: int) -> None:
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    places = msgspec.json.decode((work / "places").read_bytes(), type=list[Place])
    links = measure(places, rank, FileStore(str(work / "store"), len(places)))
    (work / f"links-{rank}").write_bytes(msgspec.json.encode(links))


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), int(sys.argv[2]))

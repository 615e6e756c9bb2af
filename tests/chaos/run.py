"""Attacks on a running application: each prints a JSON report and fails where something that must hold does not.

    python tests/chaos/run.py chaos                     starts Ray and the application itself
    python tests/chaos/run.py sockets doors --quick     several parts, in short form
    python tests/chaos/run.py doors --url http://127.0.0.1:8000 --grpc-port 9000

With --url the application that runs there is attacked as it is. It must run on this machine, for parts look at its
processes; with --ray, leases and placement groups are counted too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# In place of this folder, whose chaos.py would hide the package of that name.
sys.path[0] = str(Path(__file__).parents[1])

from chaos import chaos, doors, drains, idle, leavers, overload, poison, processes, sockets  # noqa: E402
from chaos.report import Report  # noqa: E402
from support.harness import Cluster, running_cluster  # noqa: E402

LANE: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
"""As most tests deploy it, so that short forms find it running."""
SMALL: dict[str, Any] = {**LANE, "num_cpus_per_worker": 0.01, "step_timeout_s": 10.0}


class Part(NamedTuple):
    settings: dict[str, Any]
    """Of the application."""
    attack: Callable[[Cluster], Report]
    quick: Callable[[Cluster], Report]


PARTS: dict[str, Part] = {
    "chaos": Part(
        {**SMALL, "data_parallel_size": 3},
        chaos.run,
        lambda cluster: chaos.run(cluster, streams=8, seconds=40, every_s=10, stops=False, variants=1),
    ),
    "chaos-one-lane": Part(
        SMALL,
        chaos.run,
        lambda cluster: chaos.run(cluster, streams=6, seconds=27, every_s=9, stops=False, variants=1, max_tokens=48),
    ),
    "scale-down": Part(
        {**SMALL, "autoscaling_config": drains.POOL, "drain_timeout_s": drains.DRAIN_TIMEOUT_S},
        drains.run_scale_down,
        drains.run_scale_down,
    ),
    "replace": Part(
        {
            **SMALL,
            "data_parallel_size": 2,
            "num_router_replicas": 2,
            "drain_timeout_s": drains.DRAIN_TIMEOUT_S,
        },
        drains.run_replace,
        drains.run_replace,
    ),
    "sockets": Part(SMALL, sockets.run, lambda cluster: sockets.run(cluster, messages=5_000, torch_connections=0)),
    "doors": Part(SMALL, doors.run, lambda cluster: doors.run(cluster, bodies=250, calls=250)),
    "overload": Part(
        SMALL,
        overload.run,
        lambda cluster: overload.run(cluster, seconds=8, capacity_s=4, most_clients=64, timed=False),
    ),
    "leavers": Part(SMALL, leavers.run, lambda cluster: leavers.run(cluster, sizes=leavers.FEW_SIZES)),
    "leavers-queued": Part({**SMALL, "max_num_seqs": 2}, leavers.run_queued, leavers.run_queued),
    "idle": Part(SMALL, idle.run, lambda cluster: idle.run(cluster, seconds=5, most_percent=20)),
    "poison": Part(
        {**SMALL, "model": "nan"}, poison.run, lambda cluster: poison.run(cluster, singles=False, num_pairs=20)
    ),
    "poison-tokenizer": Part(
        {**SMALL, "model": "tokenizer"},
        poison.run_tokenizer,
        lambda cluster: poison.run_tokenizer(cluster, num_requests=8),
    ),
}
"""Parts of equal settings share an application, where they follow each other."""


@contextmanager
def attached(options: argparse.Namespace) -> Iterator[Cluster]:
    """The application at --url: looked for in all processes of this machine."""
    processes.look_everywhere()
    if options.ray:
        import ray

        ray.init(address="auto", log_to_driver=False, configure_logging=False)
    _, _, port = options.url.rpartition(":")
    yield Cluster(int(port), options.grpc_port)


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        models = {} if options.url else {name: make(Path(folder)) for name, make in poison.MODELS.items()}
        with attached(options) if options.url else running_cluster() as cluster:
            reports = [attack(cluster, part, options, models) for part in options.parts]
    return 1 if any(report.failed for report in reports) else 0


def attack(cluster: Cluster, name: str, options: argparse.Namespace, models: dict[str, Path]) -> Report:
    part = PARTS[name]
    if not options.url:
        settings = dict(part.settings)
        if settings.get("model") in models:
            settings["model"] = str(models[settings["model"]])
        cluster.deploy(**settings)
    report = (part.quick if options.quick else part.attack)(cluster)
    report.part = name
    print(report, flush=True)
    if options.report:
        options.report.mkdir(parents=True, exist_ok=True)
        (options.report / f"{name}.json").write_text(f"{report}\n")
    return report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all by default; of {', '.join(PARTS)}")
    parser.add_argument("--url", help="of a running application, e.g. http://127.0.0.1:8000")
    parser.add_argument("--grpc-port", type=int, default=9000, help="its gRPC port")
    parser.add_argument("--ray", action="store_true", help="connect to its Ray, for leases and placement groups")
    parser.add_argument("--quick", action="store_true", help="the short forms")
    parser.add_argument("--report", type=Path, help="folder for one JSON file per part")
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray reads it in this spelling
    sys.exit(main())

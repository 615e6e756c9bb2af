"""Attacks on a running application: each prints a JSON report and fails where something that must hold does not.

    python tests/chaos/run.py                           all, in full
    python tests/chaos/run.py sockets doors --short     some, in short form
    python tests/chaos/run.py doors --url http://127.0.0.1:8000 --grpc-port 9000

Without --url it starts Ray and the application itself. With it the application that runs there is attacked as it is; it
must run on this machine, for parts look at its processes. With --ray too, leases and placement groups are counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In place of this folder, whose chaos.py would hide the package of that name.
sys.path[0] = str(Path(__file__).parents[1])

from chaos import poison, processes  # noqa: E402
from chaos.parts import PARTS  # noqa: E402
from chaos.report import Report  # noqa: E402
from support.harness import Cluster, running_cluster  # noqa: E402


@contextmanager
def attached(options: argparse.Namespace) -> Iterator[Cluster]:
    """The application at --url."""
    processes.look_everywhere()
    if options.ray:
        import ray

        ray.init(address="auto", log_to_driver=False, configure_logging=False)
    yield Cluster(int(options.url.rpartition(":")[2]), options.grpc_port)


def main() -> int:
    options = parse()
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder, attached(options) if options.url else running_cluster() as cluster:
        for name in options.parts:
            if not options.url:
                settings = dict(PARTS[name].settings)
                if settings.get("model") in poison.MODELS:
                    settings["model"] = str(poison.model(settings["model"], Path(folder)))
                cluster.deploy(**settings)
            reports.append(attack(cluster, name, options))
    return 1 if any(report.failed for report in reports) else 0


def attack(cluster: Cluster, name: str, options: argparse.Namespace) -> Report:
    try:
        report = (PARTS[name].short if options.short else PARTS[name].full)(cluster)
    except Exception as error:
        # The other parts are worth their reports all the same.
        report = Report(name, failed=[f"the attack itself ended: {type(error).__name__}: {error}"])
        cluster.delete()
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
    parser.add_argument("--short", action="store_true", help="the forms that make test runs")
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

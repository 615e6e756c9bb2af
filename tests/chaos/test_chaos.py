"""The short forms of what `make chaos` runs, on the application that other tests use too."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import chaos, doors, idle, leavers, overload, poison, sockets
from chaos.report import Report
from support.harness import Cluster


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Cluster:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2)
    return cluster


def passed(report: Report) -> None:
    print(report)
    assert report.failed == []


def test_bad_requests_are_refused_beside_healthy_streams(served: Cluster) -> None:
    passed(doors.run(served, bodies=150, calls=150, streams=2))


def test_garbage_on_the_sockets_does_no_harm(served: Cluster) -> None:
    passed(sockets.run(served, messages=5_000 // 6, torch_connections=0, streams=2))


def test_what_clients_that_leave_had_asked_for_ends(served: Cluster) -> None:
    passed(leavers.run(served, sizes=(40_000,)))


def test_an_idle_application_uses_no_cpu(served: Cluster) -> None:
    passed(idle.run(served, seconds=4, most_percent=20))


def test_overload_is_refused_and_what_is_accepted_finishes(served: Cluster) -> None:
    passed(overload.run(served, seconds=6, capacity_s=3, most_clients=64, timed=False))


def test_no_answer_is_lost_or_changed_when_processes_die(served: Cluster) -> None:
    passed(chaos.run(served, streams=6, seconds=20, every_s=6, stops=False, variants=1, max_tokens=48))


def test_a_poisoned_request_ends_alone(cluster: Cluster, tmp_path: Path) -> None:
    model = poison.make_nan_model(tmp_path)
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2, model=str(model))
    passed(poison.run(cluster, singles=False, num_pairs=20, streams=4))

"""The short forms of what `make chaos` runs, most of them on the application that other tests use too."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import poison
from chaos.parts import PARTS
from support.harness import Cluster

pytestmark = pytest.mark.timeout(600)  # on a broken system many requests wait for their end


@pytest.mark.parametrize("part", ["doors", "leavers", "idle", "overload", "sockets", "chaos-one-lane"])
def test_an_attack_does_no_harm(cluster: Cluster, part: str) -> None:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2)
    report = PARTS[part].short(cluster)
    print(report)
    assert report.failed == []


def test_a_poisoned_request_ends_alone(cluster: Cluster, tmp_path: Path) -> None:
    cluster.deploy(tensor_parallel_size=2, pipeline_parallel_size=2, model=str(poison.model("nan", tmp_path)))
    report = PARTS["poison"].short(cluster)
    print(report)
    assert report.failed == []

from __future__ import annotations

import pytest
from support.harness import DEMO, Cluster

from stagemesh.deployments.doctor.cluster import gather_cluster, measure_cluster
from stagemesh.deployments.doctor.gather import Places

pytestmark = pytest.mark.slow


def test_a_live_cluster_gives_facts_clocks_and_links(cluster: Cluster) -> None:
    places = Places(model=str(DEMO), http_port=cluster.http_port, grpc_port=cluster.grpc_port)
    (node,), unreachable = gather_cluster(places)
    assert unreachable == {} and node.failures == ()
    # The same machine, so its clock is the same; the wait for the answers is the error.
    assert abs(node.clock_offset_s) <= node.clock_error_s + 0.1
    assert any("raylet" in process.command for process in node.processes)
    assert {link.kind for link in measure_cluster([node])} == {"all_reduce", "p2p"}

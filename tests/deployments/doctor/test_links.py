from __future__ import annotations

import pytest
from support.doctor_facts import good_node

from stagemesh.deployments.doctor.links import Place, exercises
from stagemesh.deployments.doctor.local_links import measure_here, places_of

HERE = places_of(good_node(num_gpus=0))


def test_both_transports_of_a_lane_are_measured_between_two_processes() -> None:
    links = measure_here(HERE)
    assert [(link.kind, link.transport, link.is_inside_node) for link in links] == [
        ("all_reduce", "gloo", True),
        ("p2p", "gloo", True),
    ]
    assert all(link.latency_us > 0 and link.bandwidth_gbps > 0 for link in links)


def test_a_rank_that_fails_is_named() -> None:
    places = [HERE[0], Place("here", "nonsense", "here nonsense")]
    with pytest.raises(RuntimeError, match="here nonsense: .*nonsense"):
        measure_here(places)


def test_ranks_that_are_late_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"within 0 s: 10\.0\.0\.1 cpu 0, 10\.0\.0\.1 cpu 1"):
        measure_here(HERE, timeout_s=0)


def test_every_gpu_has_a_rank() -> None:
    assert [place.device for place in places_of(good_node(num_gpus=3))] == ["cuda:0", "cuda:1", "cuda:2"]


def test_links_inside_nodes_and_between_them_are_exercised() -> None:
    places = [Place(node, "cuda:0", "") for node in ("a", "a", "b", "b")]
    found = exercises(places)
    assert [e.ranks for e in found if e.kind == "all_reduce"] == [(0, 1), (2, 3), (0, 1, 2, 3)]
    assert len([e for e in found if e.kind == "p2p"]) == 6


def test_only_neighbours_of_many_ranks_are_exercised() -> None:
    places = [Place("a", "cuda:0", "")] * 8
    assert [e.ranks for e in exercises(places) if e.kind == "p2p"] == [(i, i + 1) for i in range(7)]

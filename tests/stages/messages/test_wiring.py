"""The wiring of an epoch, from made-up endpoints."""

from __future__ import annotations

from stagemesh.stages.messages.wiring import Endpoints, Wiring, make_wiring


def test_a_wiring_names_the_store_of_the_first_rank_and_the_plan_sockets_of_the_first_stage() -> None:
    endpoints = {
        (1, 1): Endpoints("tcp://10.0.0.2:14", None),
        (0, 1): Endpoints("tcp://10.0.0.1:12", None),
        (1, 0): Endpoints("tcp://10.0.0.2:13", None),
        (0, 0): Endpoints("tcp://10.0.0.1:11", 9999),
    }
    assert make_wiring(7, endpoints, "tcp://10.0.0.9:1", num_blocks=64) == Wiring(
        epoch=7,
        store_host="10.0.0.1",
        store_port=9999,
        results_to="tcp://10.0.0.9:1",
        sampled_tokens_to=("tcp://10.0.0.1:11", "tcp://10.0.0.1:12"),
        num_blocks=64,
    )


def test_a_lane_of_one_rank_has_no_store() -> None:
    wiring = make_wiring(1, {(0, 0): Endpoints("tcp://127.0.0.1:5", None)}, "tcp://127.0.0.1:6", num_blocks=1)
    assert (wiring.store_host, wiring.store_port) == ("127.0.0.1", 0)
    assert wiring.sampled_tokens_to == ("tcp://127.0.0.1:5",)

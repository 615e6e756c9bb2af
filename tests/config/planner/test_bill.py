from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model_configs import known_model

from stagemesh.config.capacity import capacity_line
from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.planner.bill import Transfer, boundary_transfer, lane_bill
from stagemesh.config.planner.hardware import LINKS
from stagemesh.config.planner.report import make_workload

KiB, MiB, GiB = 2**10, 2**20, 2**30


def bill(model: str, tp: int, pp: int, tokens: float, *, ep: bool = False, inter: bool = True) -> dict[str, Transfer]:
    work = make_workload(known_model(model), concurrency=32, context=4096)
    plan = ParallelPlan.resolve(work.model, tp, pp, expert_parallel=ep)
    boundaries = [(LINKS["25GbE"], inter)] * (pp - 1)
    return {t.what: t for t in lane_bill(work, plan, LINKS["pcie5"], boundaries, tokens, 32)}


def test_decoding_70b_at_32_sums_512_kib_160_times() -> None:
    reduce = bill("llama-70b", 4, 1, 32)["TP all-reduce"]
    assert (reduce.message_bytes, reduce.count) == (512 * KiB, 160)
    assert reduce.total_bytes == 80 * MiB
    assert reduce.total_bytes / 32 == 2.5 * MiB
    # A ring: each rank sends all but a quarter, twice.
    assert reduce.wire_bytes == 2 * 3 / 4 * 512 * KiB


def test_prefills_of_32_prompts_put_320_gib_through_the_ring() -> None:
    found = bill("llama-70b", 4, 2, 32 * 4096)
    assert found["TP all-reduce"].message_bytes == 2 * GiB
    assert found["TP all-reduce"].total_bytes == 320 * GiB
    assert found["PP activations"].message_bytes == 2 * GiB


def test_a_stage_hands_over_512_kib_once_for_each_rank_where_they_share_a_link() -> None:
    between, inside = bill("llama-70b", 4, 2, 32), bill("llama-70b", 4, 2, 32, inter=False)
    assert between["PP activations"].message_bytes == inside["PP activations"].message_bytes == 512 * KiB
    assert between["PP activations"].wire_bytes == 4 * inside["PP activations"].wire_bytes == 2 * MiB


def test_experts_on_ranks_add_all_to_alls_to_large_steps_alone() -> None:
    few = bill("mixtral-8x7b", 4, 1, 32, ep=True)
    assert "EP all-to-all" not in few and few["TP all-reduce"].count == 64
    many = bill("mixtral-8x7b", 4, 1, 4096, ep=True)
    # 32 layers, there and back; a quarter of the tokens, each to its 2 experts.
    assert many["EP all-to-all"].count == 64
    assert many["EP all-to-all"].message_bytes == 4096 / 4 * 2 * 4096 * 2
    assert many["TP all-reduce"].count == 32
    # The shared expert of DeepSeek keeps its sum; 3 layers are dense.
    deepseek = bill("deepseek-v3", 8, 1, 4096, ep=True)
    assert deepseek["EP all-to-all"].count == 2 * 58
    assert deepseek["TP all-reduce"].count == 2 * 61


def test_a_whole_lane_on_one_card_sends_nothing() -> None:
    assert bill("llama-8b", 1, 1, 32) == {}


def test_643232_tokens_are_15_70_requests_of_40960() -> None:
    assert "Maximum concurrency for 40,960 tokens per request: 15.70x" in capacity_line("cuda", 643_232, 40_960)


@given(
    st.sampled_from(sorted(LINKS)),
    st.floats(0, 1e12),
    st.floats(0, 1e12),
    st.integers(1, 64),
    st.integers(1, 1000),
)
def test_time_grows_with_bytes(link: str, some: float, more: float, ranks: int, count: int) -> None:
    def seconds(size: float) -> float:
        transfer = Transfer(what="", link=LINKS[link], count=count, message_bytes=size, wire_bytes=size, ranks=ranks)
        return transfer.seconds

    less, larger = sorted((some, more))
    assert 0 <= seconds(less) <= seconds(larger)


@given(st.sampled_from(["llama-70b", "mixtral-8x7b", "deepseek-v3"]), st.floats(1, 1e6), st.floats(1, 1e6))
def test_no_line_of_a_bill_shrinks_with_more_tokens(model: str, some: float, more: float) -> None:
    less, larger = (bill(model, 4, 2, tokens, ep=False) for tokens in sorted((some, more)))
    assert less.keys() == larger.keys()
    for what, transfer in less.items():
        assert transfer.total_bytes <= larger[what].total_bytes
        assert transfer.seconds <= larger[what].seconds


def test_10_gbe_carries_decoding_over_two_machines_and_25_its_prefill() -> None:
    work = make_workload(known_model("llama-70b"), concurrency=32, context=4096)
    plan = ParallelPlan.resolve(work.model, 4, 2)
    step = boundary_transfer(work, plan, LINKS["10GbE"], 32, is_inter=True)
    assert step.seconds < 0.003
    prefill = boundary_transfer(work, plan, LINKS["25GbE"], 2048, is_inter=True)
    assert prefill.wire_bytes == pytest.approx(4 * 32 * MiB)
    assert prefill.seconds < 0.1

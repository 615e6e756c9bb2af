"""Mixtures of experts: what a rank holds and reports, and the layer itself on hand-made routings."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.matrix import FAMILIES
from support.model_harness import Part, ThreadGroup, ThreadLane, make_checkpoint, some_token_ids
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close

from stagemesh.config.model import MoeConfig, MoeNames
from stagemesh.kernels.moe import moe_experts, top_k_in_groups, top_k_softmax
from stagemesh.stages.layers import moe as moe_layer
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.moe import MoE
from stagemesh.stages.layers.tensor_parallel import TensorShard


def test_a_rank_reads_its_own_experts_and_misses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_checkpoint(tmp_path, "Mixtral", num_local_experts=5, num_experts_per_tok=3)
    ThreadLane(folder, tp=2, partition=(2, 1), args={"enable_expert_parallel": True})
    assert "not used" not in caplog.text


def test_the_cache_of_latent_attention_holds_one_vector_per_token(tmp_path: Path) -> None:
    cls, settings = FAMILIES["DeepSeek-V3"]
    folder = make_checkpoint(tmp_path, cls, **settings)
    for tp in (1, 2):
        (ranks,) = ThreadLane(folder, tp=tp).stages
        assert {rank.kv_bytes_per_block() for rank in ranks} == {3 * 4 * (24 + 8) * 4}  # layers, tokens, latent, bytes


def test_a_runner_reports_how_many_tokens_each_expert_got(tmp_path: Path) -> None:
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    folder = make_checkpoint(tmp_path, "Qwen3Moe", decoder_sparse_step=2, **sizes)  # layer 1 of 3 is a mixture
    ids = some_token_ids(20, seed=5)
    for args in ({}, {"enable_expert_parallel": True}):
        lane = ThreadLane(folder, tp=2, args=args)
        assert lane.stages[0][0].expert_load() == {1: [0] * 6}
        lane.logits(Part(ids, 0, list(range(5))))
        loads = [runner.expert_load() for runner in lane.stages[0]]
        assert loads[0] == loads[1]
        assert loads[0].keys() == {1} and sum(loads[0][1]) == 2 * len(ids)


# -- the layer, on routings made by hand --------------------------------------------------------------------

HIDDEN, INNER = 6, 4


def all_to_one(num_tokens: int, num_experts: int) -> Tensor:
    return torch.full((num_tokens, 1), num_experts - 1)


def only_the_first_two(num_tokens: int, num_experts: int) -> Tensor:
    return torch.tensor([[0, 1]]).expand(num_tokens, 2)


def in_turn(num_tokens: int, num_experts: int) -> Tensor:
    first = torch.arange(num_tokens) % num_experts
    return torch.stack((first, (first + 1) % num_experts, (first + 3) % num_experts), 1)


ROUTINGS: list[Callable[[int, int], Tensor]] = [all_to_one, only_the_first_two, in_turn]


class FakeCheckpoint(Checkpoint):
    """Random tensors by name, the same on every rank."""

    def __init__(self) -> None:
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def view(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], dtype: torch.dtype | None) -> Tensor:
        seed = torch.Generator().manual_seed(sum(name.encode()) * len(name))
        return torch.randn(shape, generator=seed)[part]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_experts, size", [(7, 3), (4, 4), (5, 2)])
def test_both_ways_are_right_for_every_routing(
    routing: Callable[[int, int], Tensor],
    num_experts: int,
    size: int,
    num_tokens: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expert_ids = routing(num_tokens, num_experts)
    top_k = expert_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    monkeypatch.setattr(moe_layer, "top_k_softmax", lambda *_: (weights, expert_ids))
    config = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=INNER,
        norm_topk_prob=True,
        shared_intermediate_size=0,
        layers=frozenset([0]),
    )
    names = MoeNames("gate", "experts.{}", ("w1", "w3", "w2"))
    whole = MoE("moe", names, config, HIDDEN, TensorShard(), expert_parallel=False)
    checkpoint = FakeCheckpoint()
    whole.load(checkpoint)
    expected = naive_mixture(x, whole.experts.gate_up, whole.experts.down, weights, expert_ids)
    assert_close(whole(x), expected)

    def run(group: ThreadGroup) -> Tensor:
        layer = MoE("moe", names, config, HIDDEN, TensorShard(group.rank, size, group), expert_parallel=True)
        layer.load(checkpoint)
        out = layer(x.clone())
        assert layer.tokens_per_expert.tolist() == torch.bincount(expert_ids.flatten(), minlength=num_experts).tolist()
        return out

    with ThreadPoolExecutor(size) as pool:
        everyone = list(pool.map(run, ThreadGroup.make(size)))
    for out in everyone:
        assert_close(out, expected)
        assert torch.equal(out, everyone[0])  # ranks go on from the same bits


def naive_mixture(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """The definition, token by token."""
    out = torch.zeros_like(x)
    for t, (token_weights, experts) in enumerate(zip(weights, expert_ids.tolist(), strict=True)):
        for weight, e in zip(token_weights, experts, strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out[t] += weight * (down[e] @ (silu(gate) * up))
    return out


def test_experts_of_other_ranks_contribute_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, HIDDEN, generator=generator)
    gate_up = torch.randn(5, 2 * INNER, HIDDEN, generator=generator)
    down = torch.randn(5, HIDDEN, INNER, generator=generator)
    weights, expert_ids = top_k_softmax(torch.randn(9, 5, generator=generator), 3, False)

    lower = moe_experts(x, gate_up[:2], down[:2], weights, expert_ids)
    upper = moe_experts(x, gate_up[2:], down[2:], weights, expert_ids - 2)

    assert_close(lower + upper, naive_mixture(x, gate_up, down, weights, expert_ids))
    assert torch.equal(moe_experts(x, gate_up, down, weights, expert_ids + 5), torch.zeros_like(x))


def test_top_k_softmax_normalizes_over_all_experts_or_over_the_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    weights, expert_ids = top_k_softmax(logits, 2, False)
    assert expert_ids.tolist() == [[1, 2]]
    assert_close(weights, logits.softmax(-1)[:, [1, 2]])
    assert_close(top_k_softmax(logits, 2, True)[0], torch.tensor([[2.0, 1.0]]).softmax(-1))


def test_only_the_best_groups_are_chosen_from() -> None:
    scores = torch.tensor([[0.5, 0.4, 0.9, 0.1, 0.6, 0.7]])
    weights, expert_ids = top_k_in_groups(scores, None, 2, 3, 1)  # the group with the best expert
    assert expert_ids.tolist() == [[2, 3]] and weights.tolist() == scores[:, [2, 3]].tolist()
    # By their best two the last group leads; the bias moves the choice, not the weights.
    assert top_k_in_groups(scores, torch.zeros(6), 2, 3, 1)[1].tolist() == [[5, 4]]
    weights, expert_ids = top_k_in_groups(scores, torch.tensor([1.0, 0, 0, 0, 0, 0]), 2, 3, 2)
    assert expert_ids.tolist() == [[0, 5]] and weights.tolist() == scores[:, [0, 5]].tolist()

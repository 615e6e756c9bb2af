"""A mixture of experts: the choice of a token's experts, and the weighted sum of their results.

    out[t] = Σ_j weights[t, j] · expert(expert_ids[t, j])(x[t]),    expert(x) = down · (silu(gate·x) ⊙ up·x)

Each expert multiplies its tokens once. A token's results are added in float32 in the order of its choices, whatever
else is in the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stagemesh.kernels.silu_and_mul import silu_and_mul


def top_k_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """[T, E] → weights float32 and expert_ids int64, both [T, top_k], largest first; `renormalize`: to a sum of 1."""
    weights, expert_ids = router_logits.float().softmax(-1).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, expert_ids


def top_k_in_groups(
    scores: Tensor, bias: Tensor | None, top_k: int, num_groups: int, top_groups: int
) -> tuple[Tensor, Tensor]:
    """The best top_k of the experts in the best top_groups groups (arXiv:2405.04434, 2.2.2; 2412.19437, 2.1.2).

    scores: float32 [T, E], positive. bias: [E], added for the choice only; groups then go by their best two experts,
    else by their best one. Returns the scores without bias, and expert_ids, both [T, top_k].
    """
    choice = scores if bias is None else scores + bias
    by_group = choice.unflatten(1, (num_groups, -1))
    of_groups = by_group.topk(1 if bias is None else 2, -1).values.sum(-1)
    chosen = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, of_groups.topk(top_groups, -1).indices, True)
    expert_ids = by_group.masked_fill(~chosen[..., None], float("-inf")).flatten(1).topk(top_k, -1).indices
    return scores.gather(1, expert_ids), expert_ids


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """The weighted sum of each token's experts, [T, hidden] in the dtype of `x`.

    x: [T, hidden]. gate_up: [E, 2·I, hidden], gate above up. down: [E, hidden, I].
    weights: float32 [T, k]. expert_ids: int64 [T, k]; ids outside 0..E-1 contribute nothing.
    """

    def expert(index: int, rows: Tensor) -> Tensor:
        return silu_and_mul(rows @ gate_up[index].t()) @ down[index].t()

    return apply_experts(x, weights, expert_ids, len(gate_up), expert)


def apply_experts(
    x: Tensor, weights: Tensor, expert_ids: Tensor, num_experts: int, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """moe_experts for any `expert(index, rows [n, hidden]) → [n, hidden]`; one without tokens is not called."""
    top_k = expert_ids.shape[1]
    flat = expert_ids.flatten()
    here = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    counts = torch.bincount(here, minlength=num_experts + 1)[:num_experts].tolist()
    order = here.argsort(stable=True)[: sum(counts)]  # the others' pairs come last
    rows = x[order // top_k].split(counts)
    results = [expert(index, part) for index, part in enumerate(rows) if len(part)]
    pairs = x.new_zeros(len(flat), x.shape[1])
    if results:
        pairs[order] = torch.cat(results)
    return (pairs.view(len(x), top_k, x.shape[1]).float() * weights[..., None]).sum(1).to(x.dtype)

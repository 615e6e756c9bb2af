"""A mixture of experts, cut over the ranks of a stage in one of two ways:

- Tensor parallel: each rank has a part of every expert's intermediate features; one all-reduce.
- Expert parallel: each rank has some whole experts (config/parallel.py: expert_range). Replicated: it applies them to
  all tokens; one all-reduce. Dispatched: it takes an equal share of the tokens; an all-to-all sends them to their
  experts, another returns the results, an all-gather joins them.

Every rank routes all tokens, so no counts are sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stagemesh.config.model import MoeConfig, MoeNames
from stagemesh.config.parallel import MIN_DISPATCH_TOKENS, expert_range
from stagemesh.kernels.linear import linear, pack_weight
from stagemesh.kernels.moe import apply_experts, moe_experts, top_k_in_groups, top_k_softmax
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.linear import DenseMethod, LinearMethodFactory, dense_method, shard_slice
from stagemesh.stages.layers.mlp import GatedMLP
from stagemesh.stages.layers.tensor_parallel import TensorShard


class Experts:
    """A rank's experts, each cut over `shard`."""

    def __init__(
        self,
        name: str,
        projections: tuple[str, str, str],
        hidden_size: int,
        intermediate_size: int,
        local_experts: range,
        shard: TensorShard,
        make_method: LinearMethodFactory,
    ) -> None:
        self.names = [name.format(expert) for expert in local_experts]
        self.projections = projections
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.local_experts = local_experts
        self.part = shard_slice(intermediate_size, shard)
        # Dense weights are stacked, as a kernel for all experts at once wants them; quantized ones stay unfused.
        self.unfused_experts: list[GatedMLP] | None = None
        if not isinstance(make_method(f"{self.names[0]}.{projections[0]}"), DenseMethod):
            sizes = (hidden_size, intermediate_size, shard)
            self.unfused_experts = [
                GatedMLP(n, *sizes, bias=False, make_method=make_method, projections=projections) for n in self.names
            ]
        self.gate_up: Tensor
        self.down: Tensor

    def load(self, checkpoint: Checkpoint) -> None:
        if self.unfused_experts is not None:
            for expert in self.unfused_experts:
                expert.load(checkpoint)
            return
        gate, up, down = self.projections
        wide, narrow = (self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        columns = (slice(0, self.hidden_size), self.part)
        gates_and_ups = [(f"{name}.{side}.weight", wide, (self.part,)) for name in self.names for side in (gate, up)]
        downs = [(f"{name}.{down}.weight", narrow, columns) for name in self.names]
        self.gate_up = checkpoint.stack(gates_and_ups).unflatten(0, (len(self.names), -1))
        self.down = checkpoint.stack(downs).unflatten(0, (len(self.names), -1))

    def __call__(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """What this rank's experts add to x [T, hidden]; weights, expert_ids: [T, k]."""
        expert_ids = expert_ids - self.local_experts.start
        if (unfused := self.unfused_experts) is not None:
            return apply_experts(x, weights, expert_ids, len(unfused), lambda i, rows: unfused[i].partial(rows))
        return moe_experts(x, self.gate_up, self.down, weights, expert_ids)


class MoE:
    """Each token's top k experts and, in some families, a shared expert."""

    def __init__(
        self,
        name: str,
        names: MoeNames,
        moe: MoeConfig,
        hidden_size: int,
        tp: TensorShard,
        *,
        expert_parallel: bool,
        make_method: LinearMethodFactory = dense_method,
    ) -> None:
        self.moe = moe
        self.hidden_size = hidden_size
        self.tp = tp
        self.expert_parallel = expert_parallel
        self.router_name = f"{name}.{names.router}.weight"
        self.choice_bias_name = f"{name}.{names.choice_bias}"
        self.shared_gate_name = f"{name}.{names.shared_gate}.weight"
        self.router: Tensor
        self.choice_bias: Tensor | None = None
        self.shared_gate: Tensor | None = None
        local_experts, shard = range(moe.num_experts), tp
        if expert_parallel:
            local_experts, shard = expert_range(moe.num_experts, tp.size, tp.rank), TensorShard()
            sizes = [len(expert_range(moe.num_experts, tp.size, rank)) for rank in range(tp.size)]
            self.expert_to_rank = torch.arange(tp.size).repeat_interleave(torch.tensor(sizes))
            """int64 [E]."""
        self.experts = Experts(
            f"{name}.{names.expert}",
            names.projections,
            hidden_size,
            moe.intermediate_size,
            local_experts,
            shard,
            make_method,
        )
        self.shared = None
        if moe.shared_intermediate_size:
            shared_sizes = (hidden_size, moe.shared_intermediate_size, tp)
            self.shared = GatedMLP(f"{name}.{names.shared_expert}", *shared_sizes, bias=False, make_method=make_method)
        self.tokens_per_expert = torch.zeros(moe.num_experts, dtype=torch.int64)
        """[E], of the last step, the same on every rank."""

    def load(self, checkpoint: Checkpoint) -> None:
        num_experts = self.moe.num_experts
        dtype = torch.float32 if self.moe.float32_router else None
        self.router = pack_weight(checkpoint.read(self.router_name, (num_experts, self.hidden_size), dtype=dtype))
        if self.moe.sigmoid:
            self.choice_bias = checkpoint.read(self.choice_bias_name, (num_experts,), dtype=torch.float32)
        if self.expert_parallel:
            self.expert_to_rank = self.expert_to_rank.to(self.router.device)
        self.experts.load(checkpoint)
        if self.shared:
            self.shared.load(checkpoint)
            if self.moe.shared_gate:
                self.shared_gate = checkpoint.read(self.shared_gate_name, (1, self.hidden_size))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden], whole on every rank."""
        weights, expert_ids = self.route(x)
        self.tokens_per_expert = torch.bincount(expert_ids.flatten(), minlength=self.moe.num_experts)
        if self.expert_parallel and should_dispatch(len(x), self.tp.size):
            out = self.dispatch(x, weights, expert_ids)
            return out if self.shared is None else out + self.tp.all_reduce(self._shared_part(x))
        part = self.experts(x, weights, expert_ids)
        return self.tp.all_reduce(part if self.shared is None else part + self._shared_part(x))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32, expert_ids int64, both [T, top_k]."""
        moe = self.moe
        logits = linear(x.float() if moe.float32_router else x, self.router)
        if not moe.sigmoid and moe.num_groups == 1:
            weights, expert_ids = top_k_softmax(logits, moe.top_k, moe.norm_topk_prob)
        else:
            scores = logits.float().sigmoid() if moe.sigmoid else logits.float().softmax(-1)
            groups = (moe.num_groups, moe.top_groups)
            weights, expert_ids = top_k_in_groups(scores, self.choice_bias, moe.top_k, *groups)
            if moe.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
        return weights * moe.weight_scale, expert_ids

    def _shared_part(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        part = self.shared.partial(x)
        return part if self.shared_gate is None else torch.sigmoid(linear(x, self.shared_gate)) * part

    def dispatch(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """[T, hidden] → the experts' [T, hidden], both whole on every rank.

        Rank r takes tokens [r·share, (r + 1)·share). Pair t·k + j is token t with its j-th expert.
        """
        num_tokens, top_k, size, rank = len(x), expert_ids.shape[1], self.tp.size, self.tp.rank
        share = -(-num_tokens // size)
        expert_ranks = self.expert_to_rank[expert_ids.flatten()]
        sources = torch.arange(num_tokens * top_k, device=x.device) // (share * top_k)
        traffic = torch.bincount(sources * size + expert_ranks, minlength=size * size).view(size, size)
        sends, receives = traffic[rank].tolist(), traffic[:, rank].tolist()

        first, last = min(rank * share, num_tokens), min((rank + 1) * share, num_tokens)
        order = expert_ranks[first * top_k : last * top_k].argsort(stable=True)
        arrived = self.tp.group.all_to_all(x[first + order // top_k], sends, receives)
        # What arrives is ordered by source, then as the source numbers its pairs: in the order of all pairs.
        pairs = (expert_ranks == rank).nonzero().flatten()
        results = self.experts(arrived, weights.flatten()[pairs, None], expert_ids.flatten()[pairs, None])
        returned = self.tp.group.all_to_all(results, receives, sends)

        shares = x.new_zeros(share * top_k, x.shape[1])
        shares[order] = returned
        return self.tp.group.all_gather(shares.view(share, top_k, x.shape[1]).sum(1), 0)[:num_tokens]


def should_dispatch(num_tokens: int, size: int) -> bool:
    """Whether dispatching beats replicating."""
    return size > 1 and num_tokens >= MIN_DISPATCH_TOKENS

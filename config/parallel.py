"""How a model is cut: tensor parallel ranks within stages of contiguous layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.config.errors import ConfigError
from stagemesh.config.model import ModelConfig

NUM_SUGGESTIONS = 3
MIN_DISPATCH_TOKENS = 1024
"""With expert parallelism, steps with fewer tokens replicate them. Time of dispatching over replicating
(tests/bench/bench_expert_parallel.py, gloo, not NCCL): 256 tokens 1 on 4 to 8 ranks, 1.35 on 2; 1024 tokens 0.7 on 8,
1.2 on 2; 4096 tokens 0.5 on 8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """Who holds what in one lane. Rank = stage * tp_size + tp_rank."""

    tp_size: int
    pp_size: int
    layer_ranges: tuple[tuple[int, int], ...]
    """[start, end) of each stage's layers."""
    kv_heads_per_rank: int
    """A head may be on several ranks (see kv_heads)."""
    expert_parallel: bool = False
    """A rank holds whole experts, not a part of each."""

    def num_layers(self, stage: int) -> int:
        start, end = self.layer_ranges[stage]
        return end - start

    @classmethod
    def resolve(
        cls,
        model: ModelConfig,
        tp_size: int,
        pp_size: int,
        partition: Sequence[int] | None = None,
        *,
        expert_parallel: bool = False,
    ) -> ParallelPlan:
        """Cut `model`; `partition` = layers per stage, None = even. ConfigError names the nearest layouts that work."""
        if expert_parallel and model.moe is None:
            raise ConfigError("enable_expert_parallel", True, f"{model.architecture} has no experts")
        if (reason := _tp_problem(model, tp_size, expert_parallel)) is not None:
            nearest = _suggest(model, tp_size, pp_size, expert_parallel)
            raise ConfigError("tensor_parallel_size", tp_size, reason + nearest)
        if not 1 <= pp_size <= model.num_layers:
            reason = f"must be within 1 and num_hidden_layers={model.num_layers}"
            nearest = _suggest(model, tp_size, pp_size, expert_parallel)
            raise ConfigError("pipeline_parallel_size", pp_size, reason + nearest)
        layers = even_partition(model.num_layers, pp_size) if partition is None else tuple(partition)
        _check_partition(layers, model.num_layers, pp_size)
        starts = [sum(layers[:stage]) for stage in range(pp_size + 1)]
        return cls(
            tp_size=tp_size,
            pp_size=pp_size,
            layer_ranges=tuple(zip(starts, starts[1:], strict=False)),
            kv_heads_per_rank=len(kv_heads(model, tp_size, 0)),
            expert_parallel=expert_parallel,
        )


def kv_heads(model: ModelConfig, tp_size: int, tp_rank: int) -> tuple[int, ...]:
    """KV heads of rank r, in the order in which its query heads, r·h to (r + 1)·h, read them.

    Attention wants every local KV head to serve equally many of those: gcd(h, G), with G query heads per KV head. So a
    KV head may be on several ranks, or twice on one: 6 query and 3 KV heads on 2 ranks are (0, 0, 1) and (1, 2, 2).
    """
    heads = model.num_heads // tp_size
    group = model.num_heads // model.num_kv_heads
    run = math.gcd(heads, group)
    return tuple((tp_rank * heads + i) // group for i in range(0, heads, run))


def expert_range(num_experts: int, size: int, rank: int) -> range:
    """Experts of a rank: contiguous; the first ranks may hold one more than the last."""
    each, num_larger = divmod(num_experts, size)
    start = rank * each + min(rank, num_larger)
    return range(start, start + each + (rank < num_larger))


def even_partition(num_layers: int, pp_size: int) -> tuple[int, ...]:
    """Layers per stage, nearly equal; the last stage (logits), then the first (embedding, scheduler) get fewer."""
    each, num_larger = divmod(num_layers, pp_size)
    layers = [each] * pp_size
    for i in range(num_larger):
        layers[-2 - i] += 1
    return tuple(layers)


def _check_partition(layers: tuple[int, ...], num_layers: int, pp_size: int) -> None:
    if len(layers) != pp_size:
        reason = f"names {len(layers)} stages, pipeline_parallel_size={pp_size}"
    elif min(layers) < 1:
        reason = "every stage needs at least 1 layer"
    elif sum(layers) != num_layers:
        reason = f"adds up to {sum(layers)}, the model has num_hidden_layers={num_layers}"
    else:
        return
    fits = list(even_partition(num_layers, pp_size))
    raise ConfigError("pipeline_layer_partition", list(layers), f"{reason}; {fits} would work")


def _tp_problem(model: ModelConfig, tp_size: int, expert_parallel: bool) -> str | None:
    """Why `tp_size` ranks cannot share the layers; None = they can."""
    if tp_size < 1:
        return "must be at least 1"
    sizes = {"num_attention_heads": model.num_heads}
    moe = model.moe
    if moe is None or len(moe.layers) < model.num_layers:
        sizes["intermediate_size"] = model.intermediate_size
    if moe is not None:
        if expert_parallel and tp_size > moe.num_experts:
            return f"is more than the {moe.num_experts} experts, with expert parallelism each rank needs one"
        if not expert_parallel:
            sizes["intermediate size of an expert"] = moe.intermediate_size
        sizes["intermediate size of the shared expert"] = moe.shared_intermediate_size
    for name, size in sizes.items():
        if size % tp_size:
            return f"does not divide {name}={size}"
    return None


def _suggest(model: ModelConfig, tp_size: int, pp_size: int, expert_parallel: bool) -> str:
    """Working layouts, nearest in number of devices, then in tensor parallel size."""
    wanted = tp_size * pp_size
    works = [
        (tp, pp)
        for tp in range(1, model.num_heads + 1)
        if _tp_problem(model, tp, expert_parallel) is None
        for pp in range(1, model.num_layers + 1)
    ]
    works.sort(key=lambda layout: (abs(layout[0] * layout[1] - wanted), abs(layout[0] - tp_size)))
    shown = ", ".join(f"{tp}x{pp}" for tp, pp in works[:NUM_SUGGESTIONS])
    return f"; nearest layouts (tensor x pipeline) that work: {shown}"

"""What the layers of a model cost one rank: memory, bytes read and operations, by the tensors of config/weights.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from stagemesh.config.capacity import DTYPE_BYTES, kv_bytes_per_token
from stagemesh.config.model import DType, ModelConfig
from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.planner.hardware import Gpu
from stagemesh.config.quantization import W8A8, Quantization
from stagemesh.config.weights import Weight, edge_weights, layer_weights

Objective = Literal["latency", "throughput"]

MEMORY_EFFICIENCY = 0.75
"""Share of a card's bandwidth that a step reaches."""
FLOPS_EFFICIENCY = 0.5
"""Share of its operations per second."""
NARROW = 128
"""A matrix whose narrow side is n runs at n / (n + NARROW) of that: thin slices keep a card less busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is served, and how much of it at once."""

    model: ModelConfig
    dtype: DType
    quantization: Quantization | None
    kv_dtype_bytes: int
    concurrency: int
    """Requests that run at once, over all lanes."""
    context: int
    """Tokens of each, prompt and answer together; three quarters of them are its prompt."""
    objective: Objective = "latency"
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    """Per rank; None = what a card has left."""

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def prompt_tokens(self) -> int:
        return -(-self.context * 3 // 4)

    @property
    def output_tokens(self) -> int:
        return max(self.context - self.prompt_tokens, 1)

    def peak_flops(self, gpu: Gpu) -> float:
        format = self.quantization.format if self.quantization else None
        kind = format.kind if isinstance(format, W8A8) else "bf16"
        rate = gpu.flops.get(kind, gpu.flops["bf16"])
        return rate / 2 if self.dtype == "float32" else rate


@dataclass(frozen=True, slots=True)
class _Sum:
    """Of some layers, on one rank."""

    weight_bytes: float = 0.0
    dense_read: float = 0.0
    """Bytes that every step reads, divided by the share of NARROW."""
    expert_read: float = 0.0
    """The same of all experts: few tokens read few of them."""
    operations: float = 0.0
    """Multiplications and additions per token, divided likewise."""

    def __add__(self, other: _Sum) -> _Sum:
        return _Sum(
            self.weight_bytes + other.weight_bytes,
            self.dense_read + other.dense_read,
            self.expert_read + other.expert_read,
            self.operations + other.operations,
        )

    def __sub__(self, other: _Sum) -> _Sum:
        return _Sum(
            self.weight_bytes - other.weight_bytes,
            self.dense_read - other.dense_read,
            self.expert_read - other.expert_read,
            self.operations - other.operations,
        )


@dataclass(frozen=True, slots=True)
class StageCost:
    """One rank of a stage."""

    total: _Sum
    kv_bytes_per_token: int
    attention_operations: float
    """Per token and token of its context."""
    expert_share: float
    """Experts of a token over all experts; 0 = none."""

    @property
    def weight_bytes(self) -> int:
        return int(self.total.weight_bytes)

    def seconds(self, work: Workload, gpu: Gpu, tokens: float, kv_tokens: float, context: float) -> float:
        """A step of `tokens` tokens that reads `kv_tokens` of the cache; each token attends to `context`."""
        touched = 1 - (1 - self.expert_share) ** tokens
        read = self.total.dense_read + touched * self.total.expert_read + self.kv_bytes_per_token * kv_tokens
        operations = tokens * (self.total.operations + self.attention_operations * context)
        return max(
            read / (gpu.bandwidth * MEMORY_EFFICIENCY),
            operations / (work.peak_flops(gpu) * FLOPS_EFFICIENCY),
        )


class LaneCost:
    """All layers, cut over the ranks of a stage as `cut` says; how they are dealt to stages comes later."""

    def __init__(self, work: Workload, cut: ParallelPlan) -> None:
        """cut: of one stage."""
        self.work = work
        self.cut = cut
        model = work.model
        self.layers = [self._sum(list(layer_weights(model, cut, layer))) for layer in range(model.num_layers)]
        self._before = list(accumulate(self.layers, initial=_Sum()))
        first = self._sum(list(edge_weights(model, cut, True, False)))
        # A step looks rows of the embedding up, it does not read the table.
        self.first = _Sum(weight_bytes=first.weight_bytes)
        self.last = self._sum(list(edge_weights(model, cut, False, True)))
        whole = self._sum(list(edge_weights(model, cut, True, True)))
        self._both = _Sum(whole.weight_bytes, self.last.dense_read, 0.0, self.last.operations)

    def stage(self, plan: ParallelPlan, stage: int) -> StageCost:
        start, end = plan.layer_ranges[stage]
        total = self._before[end] - self._before[start]
        is_first, is_last = stage == 0, stage == plan.pp_size - 1
        if is_first and is_last:
            total += self._both
        elif is_first:
            total += self.first
        elif is_last:
            total += self.last
        work, model = self.work, self.work.model
        heads = model.num_heads // plan.tp_size
        return StageCost(
            total,
            kv_bytes_per_token(model, plan, stage, work.kv_dtype_bytes),
            4.0 * heads * model.head_dim * plan.num_layers(stage),
            self._expert_share,
        )

    @cached_property
    def _expert_share(self) -> float:
        moe = self.work.model.moe
        return moe.top_k / moe.num_experts if moe else 0.0

    def activation_bytes(self) -> int:
        """Of the largest step of a rank, beside weights and cache: an estimate, the engine measures."""
        work, model, tp = self.work, self.work.model, self.cut.tp_size
        width = max(model.intermediate_size, model.num_heads * model.head_dim)
        if model.moe is not None:
            width = max(width, (model.moe.top_k + 1) * model.moe.intermediate_size)
        features = 8 * model.hidden_size + 3 * -(-width // tp)
        logits = 256 * model.vocab_size * 4 * 2  # float32, and a copy for sampling
        return work.max_num_batched_tokens * features * work.dtype_bytes + logits

    def _sum(self, weights: list[Weight]) -> _Sum:
        work = self.work
        total = dense = experts = operations = 0.0
        for weight in weights:
            num_bytes = weight.num_bytes(work.dtype_bytes, work.quantization)
            narrow = min(weight.rows, weight.columns)
            slowdown = (narrow + NARROW) / narrow if narrow > 1 else 1.0
            total += num_bytes
            if weight.is_expert:
                experts += num_bytes * slowdown
                # Over the ranks of a stage each token's experts spread evenly, however they are cut.
                ranks = self.cut.tp_size if self.cut.expert_parallel else 1
                assert work.model.moe is not None
                operations += 2 * slowdown * weight.size / weight.count * work.model.moe.top_k / ranks
            else:
                dense += num_bytes * slowdown
                operations += 2 * slowdown * weight.size
        return _Sum(total, dense, experts, operations)

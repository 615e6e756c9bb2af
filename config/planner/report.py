"""A plan: the layout that is recommended, why, what it costs, and the YAML that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stagemesh.config.capacity import DTYPE_BYTES, capacity_line, kv_bytes_per_token
from stagemesh.config.errors import ConfigError
from stagemesh.config.model import DType, ModelConfig
from stagemesh.config.parallel import ParallelPlan, even_partition
from stagemesh.config.planner.bill import Transfer
from stagemesh.config.planner.costs import FLOPS_EFFICIENCY, MEMORY_EFFICIENCY, Objective, Workload
from stagemesh.config.planner.hardware import Cluster
from stagemesh.config.planner.layouts import MAX_NUM_SEQS, Layout, Rejected, Stage, find_layouts
from stagemesh.config.planner.rules import warnings
from stagemesh.config.quantization import W4A16, Quantization, QuantizationName, resolve_quantization
from stagemesh.config.weights import num_parameters

WHAT_IF_GROUP = 128
"""Group size of a 4-bit checkpoint that is not made yet: what `stagemesh quantize` writes."""
ASSUMPTIONS = (
    f"a step reaches {MEMORY_EFFICIENCY:.0%} of a card's bandwidth or {FLOPS_EFFICIENCY:.0%} of its FLOPs, narrow "
    "slices less; links reach 70 to 90 % of their rate",
    "every request is at its full context, three quarters of which are its prompt; nothing comes from the prefix cache",
    "kernels for the card are there: the README says which layers still run a reference on CUDA",
    "memory in decimal GB, as cards are sold; experts are chosen evenly; transfers do not overlap with computing",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    work: Workload
    cluster: Cluster
    layouts: tuple[Layout, ...]
    """That fit, best first; at least one."""
    rejected: tuple[Rejected, ...]

    @property
    def best(self) -> Layout:
        return self.layouts[0]

    @property
    def device(self) -> str:
        return "cpu" if self.cluster.is_cpu else "cuda"

    def capacity_line(self, layout: Layout) -> str:
        """As a lane logs it at start-up."""
        return capacity_line(self.device, layout.kv_tokens, self.work.context)

    @property
    def warnings(self) -> list[str]:
        best = self.best
        usage = self.work.concurrency / best.max_concurrency
        uneven = len({stage.gpu.name for stage in best.stages}) > 1
        found = warnings(self.work, self.cluster, best.plan, best.dp_size, usage, uneven)
        stored, wanted = self.work.model.quantization, self.work.quantization
        if stored is None and wanted is not None and isinstance(wanted.format, W4A16):
            found.append(
                f"the checkpoint is not quantized: `stagemesh quantize MODEL --to {wanted.method} --out DIR` first"
            )
        if (quick := self.quickest) is not None:
            found.append(f"by arithmetic alone {quick.name} would be faster; measure it before you decide")
        return found

    @property
    def quickest(self) -> Layout | None:
        """A layout that holds the requests and is faster on paper, but a rule speaks against it."""
        rivals = [x for x in self.layouts if x.concerns and x.holds_all >= self.best.holds_all]
        quicker = [x for x in rivals if x.score[2] < self.best.score[2] and not self.best.concerns]
        return min(quicker, key=lambda layout: layout.score[2], default=None)

    def steps(self) -> list[str]:
        """How the recommendation follows."""
        work, best, plan = self.work, self.best, self.best.plan
        single = next((x for x in self.layouts if x.plan.tp_size * x.plan.pp_size == 1), None)
        weights = sum(stage.weight_bytes for stage in best.stages) * plan.tp_size
        whole = ParallelPlan.resolve(work.model, 1, 1)
        per_token = kv_bytes_per_token(work.model, whole, 0, work.kv_dtype_bytes)
        stored = work.quantization.description if work.quantization else work.dtype
        found = [
            f"Weights: {num_parameters(work.model) / 1e9:.1f} billion parameters in {stored}, {gb(weights)} per lane. "
            f"KV: {per_token / 1024:,.0f} KiB per token, {gb(per_token * work.context)} per request of "
            f"{work.context:,} tokens, {gb(per_token * work.context * work.concurrency)} for {work.concurrency}."
        ]
        if single is None:
            found.append("One GPU does not hold the model and one such request: it is cut.")
        elif not single.holds_all:
            found.append(f"One GPU per lane has room for {single.max_concurrency:.1f} of them: too few.")
        elif single is best:
            found.append("One GPU holds the model and its share of the requests: no cut.")
        else:
            found.append(f"One GPU holds the model and its share of the requests; cut, it is {self._gain(single)}.")
        if plan.tp_size > 1:
            link = self.cluster.intra
            found.append(
                f"TP={plan.tp_size}: divides the heads, inside a machine, over {link.name} ({link.rate / 1e9:g} GB/s)."
            )
        elif (rival := next((x for x in self.layouts if x.plan.tp_size > 1), None)) is not None:
            found.append(f"TP=1: the next with more, {rival.name}: {self.against(rival)}.")
        if plan.pp_size > 1:
            where = "across machines" if any(far for _, far in best.boundaries) else "inside a machine"
            layers = ", ".join(map(str, best.partition))
            found.append(
                f"PP={plan.pp_size} {where}: lanes of fewer stages hold less or answer later; layers {layers}."
            )
        if plan.expert_parallel:
            found.append(f"EP: each of {plan.tp_size} ranks holds whole experts.")
        if best.dp_size > 1:
            found.append(f"DP={best.dp_size}: the GPUs that are left make copies, which share nothing and fail alone.")
        return found

    def _gain(self, single: Layout) -> str:
        what = "more requests finish" if self.work.objective == "throughput" else "an answer comes sooner"
        return f"{single.seconds / self.best.seconds:.1f} times as fast: {what}"

    def against(self, other: Layout) -> str:
        """Why `other` is not recommended."""
        best, work = self.best, self.work
        if best.holds_all and not other.holds_all:
            return f"holds {other.max_concurrency:.1f} of {work.concurrency} requests"
        if other.concerns and not best.concerns:
            return other.concerns[0]
        if not best.holds_all:
            return f"holds {other.max_concurrency:.1f} requests, this one {best.max_concurrency:.1f}"
        lane, best_lane = (x.plan.tp_size * x.plan.pp_size for x in (other, best))
        ratio = other.seconds / best.seconds
        what = "time per finished request" if work.objective == "throughput" else "time of a request"
        if ratio < 1:
            return f"{1 - ratio:.0%} less {what}, too little for lanes of {lane} GPUs instead of {best_lane}"
        return f"{ratio - 1:.0%} more {what}"

    def refusals(self) -> dict[str, list[str]]:
        """Reason → the layouts that it rules out."""
        found: dict[str, list[str]] = {}
        for entry in self.rejected:
            found.setdefault(entry.reason, []).append(entry.name)
        return found

    def yaml_args(self, model: str, quantization: str = "auto", kv_cache_dtype: str = "auto") -> dict[str, Any]:
        """`args` of a Serve YAML with what differs from the defaults."""
        best, plan, work = self.best, self.best.plan, self.work
        most = int(best.max_concurrency / best.dp_size)
        args: dict[str, Any] = {"model": model}
        for name, value, default in (
            ("dtype", work.dtype, work.model.torch_dtype),
            ("quantization", quantization, "auto"),
            ("kv_cache_dtype", kv_cache_dtype, "auto"),
            ("tensor_parallel_size", plan.tp_size, 1),
            ("pipeline_parallel_size", plan.pp_size, 1),
            (
                "pipeline_layer_partition",
                list(best.partition),
                list(even_partition(work.model.num_layers, plan.pp_size)),
            ),
            ("enable_expert_parallel", plan.expert_parallel, False),
            ("data_parallel_size", best.dp_size, 1),
            ("gpu_memory_utilization", work.gpu_memory_utilization, 0.92),
            ("kv_cache_memory_bytes", work.kv_cache_memory_bytes, None),
        ):
            if value != default:
                args[name] = value
        return args | {"max_model_len": work.context, "max_num_seqs": max(1, min(most, MAX_NUM_SEQS))}

    def as_dict(self) -> dict[str, Any]:
        work = self.work
        return {
            "model": {
                "architecture": work.model.architecture,
                "parameters": num_parameters(work.model),
                "layers": work.model.num_layers,
                "dtype": work.dtype,
                "quantization": work.quantization.description if work.quantization else None,
            },
            "hardware": self.cluster.description,
            "target": {"concurrency": work.concurrency, "context": work.context, "objective": work.objective},
            "recommended": self.best.name,
            "steps": self.steps(),
            "warnings": self.warnings,
            "assumptions": list(ASSUMPTIONS),
            "layouts": [self._layout_dict(layout) for layout in self.layouts],
            "rejected": [{"layouts": names, "reason": reason} for reason, names in self.refusals().items()],
        }

    def _layout_dict(self, layout: Layout) -> dict[str, Any]:
        plan, speed = layout.plan, layout.speed
        return {
            "name": layout.name,
            "tensor_parallel_size": plan.tp_size,
            "pipeline_parallel_size": plan.pp_size,
            "data_parallel_size": layout.dp_size,
            "enable_expert_parallel": plan.expert_parallel,
            "pipeline_layer_partition": list(layout.partition),
            "idle_gpus": layout.idle_gpus,
            "against": None if layout is self.best else self.against(layout),
            "concerns": list(layout.concerns),
            "kv_tokens_per_lane": layout.kv_tokens,
            "capacity": self.capacity_line(layout),
            "max_concurrency": round(layout.max_concurrency, 2),
            "speed": {name: getattr(speed, name) for name in speed.__slots__},
            "stages": [_stage_dict(stage) for stage in layout.stages],
            "bill": {"decode_step": _bill(layout.decode_bill), "prefill_of_all": _bill(layout.prefill_bill)},
        }


def make_workload(
    model: ModelConfig,
    *,
    concurrency: int,
    context: int,
    objective: Objective = "latency",
    dtype: DType | Literal["auto"] = "auto",
    quantization: QuantizationName = "auto",
    kv_cache_dtype: Literal["auto", "fp8"] = "auto",
    **limits: Any,
) -> Workload:
    """limits: further fields of Workload. `awq` and `gptq` of a dense model are a what-if. Raises ConfigError."""
    resolved = model.torch_dtype if dtype == "auto" else dtype
    if model.quantization is None and (quantization == "awq" or quantization == "gptq"):
        stored: Quantization | None = Quantization(
            method=quantization, format=W4A16(layout=quantization, group_size=WHAT_IF_GROUP)
        )
    else:
        stored = resolve_quantization(quantization, model.quantization)
    return Workload(
        model=model,
        dtype=resolved,
        quantization=stored,
        kv_dtype_bytes=1 if kv_cache_dtype == "fp8" else DTYPE_BYTES[resolved],
        concurrency=concurrency,
        context=context,
        objective=objective,
        **limits,
    )


def make_plan(work: Workload, cluster: Cluster) -> Plan:
    """Raises ConfigError when nothing fits, or the context is longer than the model's."""
    if work.context > work.model.longest_context:
        reason = f"must be within 1 and the model's longest context={work.model.longest_context}"
        raise ConfigError("context", work.context, reason)
    layouts, rejected = find_layouts(work, cluster)
    return Plan(work=work, cluster=cluster, layouts=tuple(layouts), rejected=tuple(rejected))


def binary(num_bytes: float) -> str:
    """Of messages, whose sizes are powers of two."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"


def gb(num_bytes: float) -> str:
    """In the unit that leaves one to four digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= 0.1 * size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def _stage_dict(stage: Stage) -> dict[str, Any]:
    return {
        "gpu": stage.gpu.name,
        "layers": list(stage.layers),
        "weight_bytes": stage.weight_bytes,
        "other_bytes": stage.other_bytes,
        "kv_bytes": stage.kv_bytes,
        "kv_bytes_per_token": stage.kv_bytes_per_token,
    }


def _bill(transfers: tuple[Transfer, ...]) -> list[dict[str, Any]]:
    return [
        {
            "what": transfer.what,
            "link": transfer.link.name,
            "link_bytes_per_s": transfer.link.rate,
            "messages": transfer.count,
            "message_bytes": transfer.message_bytes,
            "total_bytes": transfer.total_bytes,
            "wire_bytes": transfer.count * transfer.wire_bytes,
            "seconds": transfer.seconds,
        }
        for transfer in transfers
    ]

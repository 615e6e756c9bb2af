"""Every cut of a model over a cluster: what fits, how fast it would be, and which comes first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log2

from stagemesh.config.capacity import gpu_kv_budget, stage_kv_tokens
from stagemesh.config.errors import ConfigError
from stagemesh.config.memory import ENOUGH_BYTES, FREE_SHARE
from stagemesh.config.parallel import ParallelPlan, even_partition
from stagemesh.config.planner.bill import Transfer, boundary_transfer, lane_bill, stage_transfers
from stagemesh.config.planner.costs import LaneCost, StageCost, Workload
from stagemesh.config.planner.hardware import Cluster, Gpu, Link, is_cpu
from stagemesh.config.planner.rules import concerns

CONTEXT_BYTES = 700 * 2**20
"""Of a card, for CUDA's context and NCCL's buffers."""
MAX_NUM_SEQS = 256
"""Most sequences that a lane is planned to run at once."""
TP_WAIT, PP_WAIT = 0.03, 0.08
"""Time lost for each doubling of ranks that wait for the slowest, of stages that wait for unequal micro-batches."""
LANE_PRICE = 0.15
"""For throughput, what each doubling of a lane's GPUs must bring at least: small lanes fail alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Bytes are per rank."""

    gpu: Gpu
    """With several lanes, the least of their cards."""
    layers: tuple[int, int]
    weight_bytes: int
    other_bytes: int
    """The largest step's activations and what the driver takes."""
    kv_bytes: int
    """What is left for the cache; negative = the weights do not fit."""
    kv_bytes_per_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """A roofline: what the hardware would allow, with the efficiencies of costs.py and hardware.py."""

    first_token_s: float
    """Of one prompt, on an idle lane."""
    step_s: float
    """Between two tokens of a request, at the planned concurrency."""
    tokens_per_s: float
    """All lanes together, at the planned concurrency, decoding."""
    full_tokens_per_s: float
    """The same with as many requests as the cache holds."""
    requests_per_s: float
    """With as many requests as the cache holds, prompts included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    plan: ParallelPlan
    dp_size: int
    stages: tuple[Stage, ...]
    boundaries: tuple[tuple[Link, bool], ...]
    """Link, and whether it is one between machines, from each stage to the next."""
    kv_tokens: int
    """Of one lane."""
    idle_gpus: int
    speed: Speed
    decode_bill: tuple[Transfer, ...]
    """Of a step in which every running request of a lane gets a token."""
    prefill_bill: tuple[Transfer, ...]
    """Of the prompts of all of them, full context, as one step."""
    concerns: tuple[str, ...]
    """Rules that speak against it."""
    max_concurrency: float
    """Requests of the planned context, over all lanes."""
    holds_all: bool
    seconds: float
    """Of a request on its way (latency), or from one finished request to the next (throughput)."""
    score: tuple[bool, bool, float]
    """Lowest first: does not hold the planned requests; a rule speaks against it; then requests that do not fit, or
    seconds, for throughput with LANE_PRICE."""

    @property
    def num_gpus(self) -> int:
        return self.dp_size * self.plan.tp_size * self.plan.pp_size

    @property
    def name(self) -> str:
        sizes = {"DP": self.dp_size, "PP": self.plan.pp_size}
        parts = [f"TP={self.plan.tp_size}", *(f"{axis}={size}" for axis, size in sizes.items() if size > 1)]
        return " × ".join([*parts, "EP"] if self.plan.expert_parallel else parts)

    @property
    def partition(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.plan.layer_ranges)


@dataclass(frozen=True, slots=True)
class Rejected:
    name: str
    reason: str


def find_layouts(work: Workload, cluster: Cluster) -> tuple[list[Layout], list[Rejected]]:
    """Those that fit, best first, and why others do not. Raises ConfigError when nothing fits."""
    layouts: list[Layout] = []
    rejected: list[Rejected] = []
    for tp_size in range(1, cluster.largest_node + 1):
        for expert_parallel in (False, True)[: 1 + (work.model.moe is not None and tp_size > 1)]:
            name = f"TP={tp_size}" + " × EP" * expert_parallel
            try:
                cut = ParallelPlan.resolve(work.model, tp_size, 1, expert_parallel=expert_parallel)
            except ConfigError as error:
                rejected.append(Rejected(name, error.reason.partition(";")[0]))
                continue
            slots = cluster.slots(tp_size)
            if not slots:
                rejected.append(Rejected(name, "would mix unequal GPUs in one tensor parallel group"))
                continue
            cost = LaneCost(work, cut)
            for pp_size in (size for size in range(1, len(slots) + 1) if len(slots) % size == 0):
                found = _best_cut(work, cluster, cost, slots, pp_size)
                if isinstance(found, Layout):
                    layouts.append(found)
                elif found is not None:
                    rejected.append(found)
    if len(cluster.nodes) > 1:
        reason = "a stage's ranks are placed on one machine: across machines TP wants InfiniBand or 200 GbE RoCE"
        rejected.append(Rejected(f"TP>{cluster.largest_node}", reason))
    if not layouts:
        raise ConfigError("gpus", cluster.description, _nothing_fits(work, rejected))
    return sorted(layouts, key=lambda layout: (*layout.score, layout.num_gpus)), rejected


def _best_cut(
    work: Workload, cluster: Cluster, cost: LaneCost, slots: list[tuple[int, Gpu]], pp_size: int
) -> Layout | Rejected | None:
    """The best split of the layers; Rejected where the best does not fit, None where there is none."""
    if pp_size > work.model.num_layers:
        return None
    dp_size = min(len(slots) // pp_size, work.concurrency)
    best: Layout | None = None
    nearest: Layout | None = None
    for lanes in _lanes(slots, pp_size, dp_size):
        gpus = [_least([lane[stage][1] for lane in lanes]) for stage in range(pp_size)]
        crosses = [any(lane[s][0] != lane[s + 1][0] for lane in lanes) for s in range(pp_size - 1)]
        boundaries = tuple((cluster.inter if far else cluster.intra, far) for far in crosses)
        for partition in _partitions(work, cost, gpus):
            layout = _evaluate(work, cluster, cost, partition, gpus, boundaries, dp_size)
            if layout.kv_tokens < work.context:
                if nearest is None or _shortage(layout) < _shortage(nearest):
                    nearest = layout
            elif best is None or layout.score < best.score:
                best = layout
    if best is not None or nearest is None:
        return best
    return Rejected(nearest.name, _too_large(work, nearest))


def _lanes(slots: list[tuple[int, Gpu]], pp_size: int, dp_size: int) -> Iterator[list[list[tuple[int, Gpu]]]]:
    """Ways to deal slots to lanes: neighbours make a lane; where cards differ, also neighbours make a stage."""
    yield [slots[lane * pp_size : (lane + 1) * pp_size] for lane in range(dp_size)]
    if dp_size > 1 and len({gpu.name for _, gpu in slots}) > 1:
        every = len(slots) // pp_size
        yield [slots[lane::every][:pp_size] for lane in range(dp_size)]


def _least(gpus: Sequence[Gpu]) -> Gpu:
    """A card that is no better than any of them."""
    if len(set(map(id, gpus))) == 1:
        return gpus[0]
    kinds = set.intersection(*(set(gpu.flops) for gpu in gpus))
    return Gpu(
        name="/".join(dict.fromkeys(gpu.name for gpu in gpus)),
        memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        bandwidth=min(gpu.bandwidth for gpu in gpus),
        flops={kind: min(gpu.flops[kind] for gpu in gpus) for kind in kinds},
    )


def _partitions(work: Workload, cost: LaneCost, gpus: Sequence[Gpu]) -> set[tuple[int, ...]]:
    """Candidates: even; balanced by memory, and by time, each with embedding and head counted."""
    num_layers, pp_size = work.model.num_layers, len(gpus)
    memory = [layer.weight_bytes for layer in cost.layers]
    seconds = [layer.dense_read + layer.expert_read for layer in cost.layers]
    by_memory = (memory, cost.first.weight_bytes, cost.last.weight_bytes)
    by_time = (seconds, 0.0, cost.last.dense_read)
    shares = {
        tuple(1.0 for _ in gpus),
        tuple(float(gpu.memory_bytes) for gpu in gpus),
        tuple(gpu.bandwidth for gpu in gpus),
    }
    found = {even_partition(num_layers, pp_size)}
    for share in shares:
        found |= {balanced_partition(*loads, share) for loads in (by_memory, by_time)}
    return found


def balanced_partition(
    layers: Sequence[float], before: float, after: float, shares: Sequence[float]
) -> tuple[int, ...]:
    """Layers per stage, each stage's load near its share. before, after: loads of the first and last stage alone."""
    total = before + sum(layers) + after
    done = [before + load for load in accumulate(layers, initial=0.0)]
    cuts = [0]
    for stage, share in enumerate(accumulate(shares[:-1]), start=1):
        wanted = total * share / sum(shares)
        least, most = cuts[-1] + 1, len(layers) - (len(shares) - stage)
        cuts.append(min(range(least, most + 1), key=lambda cut: abs(done[cut] - wanted)))
    cuts.append(len(layers))
    return tuple(end - start for start, end in zip(cuts, cuts[1:], strict=False))


def _evaluate(
    work: Workload,
    cluster: Cluster,
    cost: LaneCost,
    partition: tuple[int, ...],
    gpus: Sequence[Gpu],
    boundaries: tuple[tuple[Link, bool], ...],
    dp_size: int,
) -> Layout:
    cut = cost.cut
    plan = ParallelPlan.resolve(work.model, cut.tp_size, len(partition), partition, expert_parallel=cut.expert_parallel)
    costs = [cost.stage(plan, stage) for stage in range(plan.pp_size)]
    stages = tuple(_stage(work, plan, i, costs[i], gpu, cost.activation_bytes()) for i, gpu in enumerate(gpus))
    kv_tokens = min(
        stage_kv_tokens(work.model, plan, i, work.kv_dtype_bytes, max(stage.kv_bytes, 0), work.block_size)
        for i, stage in enumerate(stages)
    )
    per_lane = -(-work.concurrency // dp_size)
    max_per_lane = kv_tokens / work.context
    lane = _Lane(work, cluster.intra, plan, costs, gpus, boundaries)
    speed = lane.speed(dp_size, per_lane, max(min(max_per_lane, MAX_NUM_SEQS), 1.0))
    used = dp_size * plan.tp_size * plan.pp_size
    # Lanes that the planned requests leave idle are no fault of the cut.
    idle = cluster.num_gpus - used if dp_size < work.concurrency else 0
    against = concerns(work, cluster, plan, idle)
    holds_all = max_per_lane >= per_lane
    seconds = score = speed.first_token_s + work.output_tokens * speed.step_s
    if work.objective == "throughput":
        seconds = 1 / speed.requests_per_s
        score = seconds * (1 + LANE_PRICE) ** log2(plan.tp_size * plan.pp_size)
    if not holds_all:
        score = work.concurrency - dp_size * max_per_lane
    bill = (work, plan, cluster.intra, boundaries)
    return Layout(
        plan=plan,
        dp_size=dp_size,
        stages=stages,
        boundaries=boundaries,
        kv_tokens=kv_tokens,
        idle_gpus=cluster.num_gpus - used,
        speed=speed,
        decode_bill=tuple(lane_bill(*bill, per_lane, per_lane)),
        prefill_bill=tuple(lane_bill(*bill, per_lane * work.context, per_lane)),
        concerns=against,
        max_concurrency=dp_size * max_per_lane,
        holds_all=holds_all,
        seconds=seconds,
        score=(not holds_all, bool(against), score),
    )


def _stage(work: Workload, plan: ParallelPlan, stage: int, cost: StageCost, gpu: Gpu, activations: int) -> Stage:
    weights = cost.weight_bytes
    if is_cpu(gpu):
        others = 0
        budget = work.kv_cache_memory_bytes or min(ENOUGH_BYTES, int((gpu.memory_bytes - weights) * FREE_SHARE))
        budget = min(budget, gpu.memory_bytes - weights) if gpu.memory_bytes < weights + budget else budget
    else:
        others = activations + CONTEXT_BYTES
        left = gpu_kv_budget(gpu.memory_bytes, work.gpu_memory_utilization, weights + CONTEXT_BYTES, activations)
        budget = left if work.kv_cache_memory_bytes is None else min(left, work.kv_cache_memory_bytes)
    return Stage(
        gpu=gpu,
        layers=plan.layer_ranges[stage],
        weight_bytes=weights,
        other_bytes=others,
        kv_bytes=budget,
        kv_bytes_per_token=cost.kv_bytes_per_token,
    )


@dataclass(frozen=True, slots=True)
class _Lane:
    work: Workload
    intra: Link
    plan: ParallelPlan
    costs: Sequence[StageCost]
    gpus: Sequence[Gpu]
    boundaries: tuple[tuple[Link, bool], ...]

    def speed(self, dp_size: int, per_lane: int, most_per_lane: float) -> Speed:
        """per_lane: requests at the planned concurrency; most_per_lane: at the highest."""
        work = self.work
        chunk = min(work.prompt_tokens, work.max_num_batched_tokens)
        chunks = work.prompt_tokens / chunk
        total, slowest = self._pass(chunk, work.prompt_tokens / 2, work.prompt_tokens / 2, 1)
        step, full_step = self._step_s(per_lane), self._step_s(most_per_lane)
        return Speed(
            first_token_s=total + (chunks - 1) * slowest,
            step_s=step,
            tokens_per_s=work.concurrency / step,
            full_tokens_per_s=dp_size * most_per_lane / full_step,
            requests_per_s=dp_size / (chunks * slowest + work.output_tokens * full_step / most_per_lane),
        )

    def _step_s(self, requests: float) -> float:
        """Seconds in which each of `requests` gets a token: they go through the stages in micro-batches."""
        batches = min(float(self.plan.pp_size), requests)
        tokens, context = requests / batches, self.work.context
        total, slowest = self._pass(tokens, tokens * context, context, tokens)
        return max(total, batches * slowest)

    def _pass(self, tokens: float, kv_tokens: float, context: float, samples: float) -> tuple[float, float]:
        """A micro-batch through all stages: seconds in all, and on the stage that takes longest."""
        seconds = []
        for stage, (cost, gpu) in enumerate(zip(self.costs, self.gpus, strict=True)):
            sent = stage_transfers(self.work, self.plan, stage, self.intra, tokens, samples)
            computed = cost.seconds(self.work, gpu, tokens, kv_tokens, context)
            seconds.append(computed + sum(transfer.seconds for transfer in sent))
        hops = [
            boundary_transfer(self.work, self.plan, link, tokens, is_inter=is_inter).seconds
            for link, is_inter in self.boundaries
        ]
        wait = (1 + TP_WAIT * log2(self.plan.tp_size)) * (1 + PP_WAIT * log2(self.plan.pp_size))
        return wait * (sum(seconds) + sum(hops)), wait * max(seconds + hops)


def _shortage(layout: Layout) -> int:
    """Bytes that the fullest rank lacks for one request, and more."""
    return max(stage.weight_bytes + stage.other_bytes - stage.gpu.memory_bytes for stage in layout.stages)


def _too_large(work: Workload, layout: Layout) -> str:
    def lacks(stage: Stage) -> int:
        return work.context * stage.kv_bytes_per_token - stage.kv_bytes

    worst = max(layout.stages, key=lacks)
    weights, needed = worst.weight_bytes / 1e9, work.context * worst.kv_bytes_per_token / 1e9
    left = f"{max(worst.kv_bytes, 0) / 1e9:.1f} GB are left for KV" if worst.kv_bytes > 0 else "nothing is left for KV"
    return (
        f"weights take {weights:.1f} GB of a {worst.gpu.name}, {left}; one request of {work.context:,} tokens "
        f"needs {needed:.1f} GB"
    )


def _nothing_fits(work: Workload, rejected: Iterable[Rejected]) -> str:
    reasons = "\n".join(f"  {entry.name}: {entry.reason}" for entry in rejected)
    remedies = "more or larger GPUs, a shorter --context"
    if work.quantization is None:
        remedies += ", --quantization fp8"
    return f"the model does not fit:\n{reasons}\nWhat helps: {remedies}"

"""Rules of thumb that arithmetic on bytes does not replace. A layout against which one speaks comes after the others.

None depends on the memory of a card, so that more memory never makes a plan worse.
"""

from __future__ import annotations

from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.planner.costs import Workload
from stagemesh.config.planner.hardware import GB, Cluster

FAST_LINK = 50 * GB
"""Bytes per second each way that tensor parallelism wants between cards."""
MAX_PCIE_TP = 4


def concerns(work: Workload, cluster: Cluster, plan: ParallelPlan, idle_gpus: int) -> tuple[str, ...]:
    """What speaks against a layout; idle_gpus: that its cut leaves unused."""
    tp, link = plan.tp_size, cluster.intra
    found = []
    if tp > 1 and link.rate < FAST_LINK and not cluster.is_cpu:
        found.append(
            f"{link.name} gives a card {link.rate / GB:.3g} GB/s each way, TP wants {FAST_LINK // GB}: stages instead"
        )
    elif tp > MAX_PCIE_TP and link.is_pcie and not cluster.is_cpu:
        found.append(f"TP={tp} over PCIe: beyond {MAX_PCIE_TP} cards share lanes and cross the host's bridges")
    if tp > 1 and plan.pp_size > 1 and work.model.num_heads % cluster.largest_node:
        heads, cards = work.model.num_heads, cluster.largest_node
        found.append(f"{cards} GPUs do not divide the {heads} heads: stages of one GPU use all of them evenly")
    if tp > 1 and work.model.moe is not None and not plan.expert_parallel:
        found.append("slices of experts are narrow: a mixture runs better with whole experts on a rank (EP)")
    if idle_gpus:
        found.append(f"leaves {idle_gpus} of {cluster.num_gpus} GPUs idle")
    return tuple(found)


def warnings(
    work: Workload, cluster: Cluster, plan: ParallelPlan, dp_size: int, kv_usage: float, has_uneven_stages: bool
) -> list[str]:
    """What to know before running a layout. kv_usage: of the planned requests, 1 = all."""
    found = list(concerns(work, cluster, plan, cluster.num_gpus - dp_size * plan.tp_size * plan.pp_size))
    if kv_usage > 1:
        found.append(f"KV: the planned requests need {kv_usage:.0%} of the cache; the others wait or are preempted")
    elif kv_usage > 0.95:
        found.append(f"KV: the planned requests take {kv_usage:.0%} of the cache; above 95 % the engine preempts")
    if plan.tp_size * plan.kv_heads_per_rank > work.model.num_kv_heads:
        copies = "whole" if work.model.mla else "copied"
        found.append(f"KV heads: {work.model.num_kv_heads} on {plan.tp_size} ranks, so the cache is {copies} on each")
    if plan.pp_size > 1 and work.concurrency < plan.pp_size * dp_size:
        found.append(f"{work.concurrency} requests do not fill {plan.pp_size} stages: PP only adds hops to each token")
    if has_uneven_stages:
        found.append("unequal GPUs: Ray places a stage on any free GPU; give each kind its own placement by hand")
    if plan.pp_size > 1 and len(cluster.nodes) > 1 and cluster.inter.rate < 3 * GB:
        found.append(f"{cluster.inter.name} between stages is marginal for prefill bursts; 25GbE is enough")
    if dp_size > 1:
        found.append(f"{dp_size} lanes: the router keeps prompts that begin alike on one of them")
    return found

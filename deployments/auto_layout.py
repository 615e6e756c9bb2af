"""`layout: auto`: the planner's choice for the GPUs that Ray shows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from stagemesh.config.engine import LAYOUT_SIZES, EngineArgs, pick_device
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model
from stagemesh.config.model import ModelConfig
from stagemesh.config.planner.hardware import GPUS, Cluster, Gpu, cluster_of
from stagemesh.config.planner.report import make_plan, make_workload

logger = logging.getLogger("ray.serve")

CONCURRENCY = 32
"""Requests to plan for; a lane may run max_num_seqs."""
CONTEXT = 8192
"""Tokens of each, where max_model_len does not say and the model allows more."""
LABEL, RESOURCE = "ray.io/accelerator-type", "accelerator_type:"


def with_layout(args: EngineArgs) -> EngineArgs:
    """`args` with the sizes of the best layout for throughput. Ray must run.

    As they are without `layout: auto`, without GPUs, or with GPUs that the planner does not know. Raises ConfigError
    when the model does not fit.
    """
    given = set(LAYOUT_SIZES) & args.model_fields_set
    if args.layout is None or given or pick_device(args) == "cpu":
        return args  # both, layout and sizes, are refused by EngineConfig
    cluster = cluster_of_nodes(ray.nodes())
    if cluster is None:
        return args
    model = ModelConfig.from_folder(find_model(args.model, args.revision, args.download_dir), args.hf_overrides)
    context = args.max_model_len if isinstance(args.max_model_len, int) else None
    work = make_workload(
        model,
        concurrency=CONCURRENCY,
        context=context or min(model.max_position_embeddings, CONTEXT),
        objective="throughput",
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    )
    plan = make_plan(work, cluster)
    for line in (f"layout auto: {plan.best.name} on {cluster.description}", *plan.steps(), *plan.warnings):
        logger.info("%s", line)
    chosen = {name: value for name, value in plan.yaml_args(args.model).items() if name in LAYOUT_SIZES}
    if args.autoscaling_config is not None:
        chosen.pop("data_parallel_size", None)
    asked = {name: getattr(args, name) for name in args.model_fields_set - {"layout"}}
    return EngineArgs.parse(asked | chosen)


def connected_cluster(*, intra: str | None, inter: str) -> Cluster:
    """Of the Ray cluster that runs here. Raises ConfigError."""
    if not ray.is_initialized():
        try:
            ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError:
            reason = "no Ray cluster runs here: name the GPUs, e.g. --gpus 8xL40S-48GB"
            raise ConfigError("gpus", None, reason) from None
    cluster = cluster_of_nodes(ray.nodes(), intra=intra, inter=inter)
    if cluster is None:
        reason = "Ray shows no GPU that the planner knows: name them, e.g. --gpus 8xL40S-48GB"
        raise ConfigError("gpus", None, reason)
    return cluster


def cluster_of_nodes(
    nodes: Sequence[Mapping[str, Any]], *, intra: str | None = None, inter: str = "25GbE"
) -> Cluster | None:
    """nodes: as `ray.nodes()` lists them. None without GPUs, or with one that no table knows."""
    machines: list[tuple[Gpu, ...]] = []
    for node in nodes:
        count = int(node["Resources"].get("GPU", 0))
        if not node["Alive"] or not count:
            continue
        gpu = _gpu_of(node)
        if gpu is None:
            logger.warning("layout auto: unknown GPUs on %s, set the sizes by hand", node["NodeManagerHostname"])
            return None
        machines.append((gpu,) * count)
    # Equal machines side by side, so that the stages of a lane are on equal ones.
    order = Counter(machines)
    machines = [machine for machine in order for _ in range(order[machine])]
    return cluster_of(tuple(machines), intra=intra, inter=inter) if machines else None


def _gpu_of(node: Mapping[str, Any]) -> Gpu | None:
    """By Ray's label, e.g. A100, A100-80G or GeForce-RTX-4090; of several sizes the smallest."""
    label = (node.get("Labels") or {}).get(LABEL, "")
    names = [label, *(name.removeprefix(RESOURCE) for name in node["Resources"] if name.startswith(RESOURCE))]
    found: list[Gpu] = []
    for name in filter(None, names):
        plain = name.removeprefix("GeForce-")
        exact = GPUS.get(f"{plain}B")  # Ray's A100-80G
        found += [exact] if exact else [gpu for key, gpu in GPUS.items() if key.rpartition("-")[0] == plain]
        if exact:
            return exact
    return min(found, key=lambda gpu: gpu.memory_bytes, default=None)

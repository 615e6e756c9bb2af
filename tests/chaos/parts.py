"""Every attack with the settings of the application that it needs, in full and in short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from chaos import chaos, doors, drains, idle, leavers, overload, poison, sockets
from chaos.report import Report
from support.harness import Cluster

LANE: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "num_cpus_per_worker": 0.01,
    "step_timeout_s": 10.0,
}
POOL: dict[str, Any] = {**LANE, "autoscaling_config": drains.POOL, "drain_timeout_s": drains.DRAIN_TIMEOUT_S}


class Part(NamedTuple):
    settings: dict[str, Any]
    """Of the application. `model` may be a key of poison.MODELS."""
    full: Callable[[Cluster], Report]
    short: Callable[[Cluster], Report]
    """Less of it, nothing that depends on how fast a busy machine is; where there is no less, the same."""


def _short_chaos(cluster: Cluster) -> Report:
    return chaos.run(cluster, streams=6, seconds=20, every_s=6, stops=False, variants=1, max_tokens=48)


def _short_sockets(cluster: Cluster) -> Report:
    return sockets.run(cluster, messages=1_000, torch_connections=0, streams=2)


def _short_doors(cluster: Cluster) -> Report:
    return doors.run(cluster, bodies=150, calls=150, streams=2)


def _short_overload(cluster: Cluster) -> Report:
    # More requests than a lane runs at once, however slow the machine is.
    size = {"most_clients": 64, "max_tokens": 24, "least_requests": 400}
    return overload.run(cluster, seconds=6, capacity_s=3, timed=False, **size)


def _short_leavers(cluster: Cluster) -> Report:
    return leavers.run(cluster, sizes=(40_000,))


def _short_idle(cluster: Cluster) -> Report:
    return idle.run(cluster, seconds=4, most_percent=20)


def _short_poison(cluster: Cluster) -> Report:
    return poison.run(cluster, singles=False, num_pairs=20, streams=4)


def _short_poison_tokenizer(cluster: Cluster) -> Report:
    return poison.run_tokenizer(cluster, num_requests=12, streams=4)


PARTS: dict[str, Part] = {
    "chaos": Part({**LANE, "data_parallel_size": 3}, chaos.run, _short_chaos),
    "chaos-one-lane": Part(LANE, chaos.run, _short_chaos),
    "sockets": Part(LANE, sockets.run, _short_sockets),
    "doors": Part(LANE, doors.run, _short_doors),
    "overload": Part(LANE, overload.run, _short_overload),
    "leavers": Part(LANE, leavers.run, _short_leavers),
    "idle": Part(LANE, idle.run, _short_idle),
    "leavers-queued": Part({**LANE, "max_num_seqs": 2}, leavers.run_queued, leavers.run_queued),
    "scale-down": Part(POOL, drains.run_scale_down, drains.run_scale_down),
    "replace": Part(
        {**LANE, "data_parallel_size": 2, "num_router_replicas": 2, "drain_timeout_s": 30.0},
        drains.run_replace,
        drains.run_replace,
    ),
    "poison": Part({**LANE, "model": "nan"}, poison.run, _short_poison),
    "poison-tokenizer": Part({**LANE, "model": "tokenizer"}, poison.run_tokenizer, _short_poison_tokenizer),
}
"""Parts of equal settings that follow each other share an application."""

"""From a YAML's `args` to a Ray Serve application: one Router deployment and one deployment per stage."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.generation_config import default_sampling
from stagemesh.deployments.ingress.router import Router
from stagemesh.deployments.lane.leader import Leader
from stagemesh.deployments.lane.stage import Stage
from stagemesh.deployments.lane.worker_group import rank_resources
from stagemesh.stages.text.tokenizer import Tokenizer

UNLIMITED_REQUESTS = 100_000
"""Serve's own limits on open calls are out of the way: the scheduler queues and the router bounds."""
HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0}
"""A dead replica is noticed, and its successor started, within this period; Serve's own is 10 s."""
STAGE_AUTOSCALING = {
    "target_ongoing_requests": 1,  # one lease per replica
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1.0,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 10.0,
}
"""How the pools of later stages follow the number of leaders."""


def build(args: dict[str, Any]) -> Application:
    """The `import_path` of every Serve YAML. Raises ConfigError before anything starts."""
    config = EngineConfig.resolve(EngineArgs.parse(args))
    # What is wrong with these is better told here than by every router.
    Tokenizer.from_folder(config.model_path)
    default_sampling(config)
    autoscaling = config.autoscaling_config
    lanes: dict[str, Any] = (
        {"num_replicas": config.data_parallel_size} if autoscaling is None else {"autoscaling_config": autoscaling}
    )
    later_stages = [_stage(config, stage) for stage in range(1, config.plan.pp_size)]
    leader = (
        serve.deployment(Leader)
        .options(
            name="stage-0",
            max_ongoing_requests=UNLIMITED_REQUESTS,
            request_router_config=RequestRouterConfig(
                request_router_class="stagemesh.deployments.ingress.request_router:LaneRouter"
            ),
            graceful_shutdown_timeout_s=config.drain_timeout_s,
            **HEALTH,
            **lanes,
            **_resources(config),
        )
        .bind(config, *later_stages)
    )
    return (
        serve.deployment(Router)
        .options(
            name="router",
            num_replicas=config.num_router_replicas,
            max_ongoing_requests=UNLIMITED_REQUESTS,
            ray_actor_options={"num_cpus": config.num_cpus_per_worker},
            graceful_shutdown_timeout_s=config.drain_timeout_s,
            **HEALTH,
        )
        .bind(config, leader)
    )


def _stage(config: EngineConfig, stage: int) -> Application:
    autoscaling = config.autoscaling_config
    pool: dict[str, Any] = (
        {"num_replicas": config.data_parallel_size}
        if autoscaling is None
        else {
            "autoscaling_config": {
                **STAGE_AUTOSCALING,
                "min_replicas": autoscaling.get("min_replicas", 1),
                "max_replicas": autoscaling.get("max_replicas", 1),
            }
        }
    )
    return (
        serve.deployment(Stage)
        .options(
            name=f"stage-{stage}",
            max_ongoing_requests=1,
            # An idle replica has nothing to drain; a leased one is wanted until its leader lets go.
            graceful_shutdown_timeout_s=config.drain_timeout_s,
            **HEALTH,
            **pool,
            **_resources(config),
        )
        .bind(config, stage)
    )


def _resources(config: EngineConfig) -> dict[str, Any]:
    """A placement group per replica: bundle 0 for the replica, one per rank of its TP group, on one node."""
    num_cpus = config.num_cpus_per_worker
    return {
        "ray_actor_options": {"num_cpus": num_cpus},
        "placement_group_bundles": [{"CPU": num_cpus}] + [rank_resources(config)] * config.plan.tp_size,
        "placement_group_strategy": "STRICT_PACK",
    }

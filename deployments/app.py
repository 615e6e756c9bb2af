"""From a YAML's `args` to a Serve application: the router and the stages."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.generation_config import default_sampling
from stagemesh.deployments.auto_layout import with_layout
from stagemesh.deployments.ingress.router import Router
from stagemesh.deployments.lane.leader import Leader
from stagemesh.deployments.lane.stage import Stage
from stagemesh.deployments.lane.worker_group import rank_resources
from stagemesh.stages.text.input import InputProcessor
from stagemesh.stages.text.tokenizer import Tokenizer

UNLIMITED_REQUESTS = 100_000
"""No limit by Serve: the scheduler queues, and the router bounds."""
HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 10.0, "graceful_shutdown_wait_loop_s": 0.5}
"""Notices a dead replica, and that a replica has drained, sooner than Serve's defaults of 10 s and 2 s."""
ROUTER_HEALTH = {**HEALTH, "health_check_timeout_s": 60.0}
"""A router that is late because of ten times the load is not dead: to replace it would break its streams."""
STAGE_AUTOSCALING = {
    "target_ongoing_requests": 1,  # one lease per replica
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1.0,
    "upscale_delay_s": 5.0,
    "downscale_delay_s": 10.0,
}
"""The pools of later stages follow the number of leaders. A lease that was queued is counted twice for a moment, by
the leader that waited and the replica that took it: without a delay Serve would load a copy that nobody leases."""


def build(args: dict[str, Any]) -> Application:
    """The `import_path` of every YAML. Raises ConfigError before anything starts."""
    config = EngineConfig.resolve(with_layout(EngineArgs.parse(args)))
    # Read here too, so that an error in them is reported once and not by every router.
    InputProcessor(
        Tokenizer.from_folder(config.local_tokenizer_path(), config.chat_template),
        vocab_size=config.model.vocab_size,
        max_model_len=config.max_model_len,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    default_sampling(config)
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
            **_num_replicas(config, config.autoscaling_config),
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
            **ROUTER_HEALTH,
        )
        .bind(config, leader)
    )


def _stage(config: EngineConfig, stage: int) -> Application:
    lanes = config.autoscaling_config or {}
    limits = {name: lanes.get(name, 1) for name in ("min_replicas", "max_replicas")}
    return (
        serve.deployment(Stage)
        .options(
            name=f"stage-{stage}",
            max_ongoing_requests=1,
            graceful_shutdown_timeout_s=config.drain_timeout_s,  # a leased replica is needed while its leader drains
            **HEALTH,
            **_num_replicas(config, {**STAGE_AUTOSCALING, **limits}),
            **_resources(config),
        )
        .bind(config, stage)
    )


def _num_replicas(config: EngineConfig, autoscaling: dict[str, Any] | None) -> dict[str, Any]:
    if config.autoscaling_config is None:
        return {"num_replicas": config.data_parallel_size}
    return {"autoscaling_config": autoscaling}


def _resources(config: EngineConfig) -> dict[str, Any]:
    """A placement group on one node: bundle 0 for the replica, then one per rank."""
    num_cpus = config.num_cpus_per_worker
    return {
        "ray_actor_options": {"num_cpus": num_cpus},
        "placement_group_bundles": [{"CPU": num_cpus}] + [rank_resources(config)] * config.plan.tp_size,
        "placement_group_strategy": "STRICT_PACK",
    }

"""The Stage deployment: a copy of a later stage, leased to one lane at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import ray
from ray.actor import ActorHandle

from stagemesh.config.engine import EngineConfig
from stagemesh.deployments.lane.worker_group import GroupState, WorkerGroup

logger = logging.getLogger("ray.serve")

LEADER_CHECK_PERIOD_S = 0.5
"""Serve does not cancel the open call of a caller that died."""


class Stage:
    """An open `lease` call is the lease: with `max_ongoing_requests=1`, Serve scales the replicas with the leaders."""

    async def __init__(self, config: EngineConfig, stage: int) -> None:  # type: ignore[misc]  # Serve awaits it
        self._stage = stage
        self._group = WorkerGroup(config, stage)
        try:
            await self._group.start()
        except BaseException:
            self._group.close()
            raise

    async def lease(self, leader: ActorHandle, lane: str) -> AsyncIterator[GroupState]:
        """Yields the group's state now and at every change, until the leader's process dies."""
        logger.info("stage %d: leased to lane %s", self._stage, lane)
        states = self._group.states()
        next_state = asyncio.ensure_future(anext(states))
        leader_died = asyncio.ensure_future(until_dead(leader))
        try:
            while True:
                await asyncio.wait({next_state, leader_died}, return_when=asyncio.FIRST_COMPLETED)
                if leader_died.done():
                    logger.warning("stage %d: lane %s lost its leader, released", self._stage, lane)
                    return
                yield next_state.result()
                next_state = asyncio.ensure_future(anext(states))
        finally:
            next_state.cancel()
            leader_died.cancel()
            logger.info("stage %d: lease of lane %s ended", self._stage, lane)

    def __del__(self) -> None:
        if hasattr(self, "_group"):
            self._group.close()


async def until_dead(actor: ActorHandle) -> None:
    """Return when the actor's process is gone. `__ray_ready__` is Ray's no-op."""
    while True:
        try:
            await actor.__ray_ready__.remote()
        except ray.exceptions.RayActorError:
            return
        await asyncio.sleep(LEADER_CHECK_PERIOD_S)

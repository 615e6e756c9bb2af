"""The Stage deployment: a copy of a later stage, leased to one lane at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import ray
from ray.actor import ActorHandle

from stagemesh.config.engine import EngineConfig
from stagemesh.config.fingerprint import fingerprint
from stagemesh.deployments.lane.worker_group import GroupState, WorkerGroup

logger = logging.getLogger("ray.serve")

LEADER_CHECK_PERIOD_S = 1.0
"""Serve does not cancel the open call of a caller that died. One check costs both sides about 1 ms of a core."""


class LeaseRefused(RuntimeError):
    """Another replica may accept the leader."""


class Stage:
    """An open `lease` call is the lease: with `max_ongoing_requests=1`, Serve scales the replicas with the leaders."""

    async def __init__(self, config: EngineConfig, stage: int) -> None:  # type: ignore[misc]  # Serve awaits it
        self._stage = stage
        self._group = WorkerGroup(config, stage)
        try:
            # In a thread, as it reads files.
            self._fingerprint, _ = await asyncio.gather(asyncio.to_thread(fingerprint, config), self._group.start())
        except BaseException:
            self._group.close()
            raise

    async def lease(self, leader: ActorHandle, lane: str, fingerprint: str) -> AsyncIterator[GroupState]:
        """Yields the group's state now and at every change, until the leader's process dies.

        Raises LeaseRefused if the leader's fingerprint is another: lanes never mix versions. When the lease ends,
        nothing of it runs in the workers any more.
        """
        if fingerprint != self._fingerprint:
            raise LeaseRefused(
                f"lane {lane} has fingerprint {fingerprint}, this replica of stage {self._stage} has "
                f"{self._fingerprint}: configuration, code or checkpoint differ"
            )
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
            await self._group.stop_run()  # before the next lease: later it would stop that one's run
            logger.info("stage %d: lease of lane %s ended", self._stage, lane)

    async def check_health(self) -> None:
        """Serve replaces a stage whose workers cannot be replaced."""
        self._group.check_health()

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

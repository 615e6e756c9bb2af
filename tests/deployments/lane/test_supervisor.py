"""The supervisor of a lane, as far as it needs no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
import zmq
from support.harness import DEMO

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.deployments.lane.supervisor import LaneSupervisor
from stagemesh.deployments.lane.worker_group import GroupState
from stagemesh.stages.messages.request import LaneStats, TokenDelta


class Sink:
    """Listens to nothing: no token comes."""

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        return True

    def publish(self, stats: LaneStats) -> None:
        pass

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        return set()


class BrokenGroup:
    async def states(self) -> AsyncIterator[GroupState]:
        yield GroupState(0, reason="loading")
        raise OSError("the disk is gone")


def test_a_lane_whose_supervisor_fails_does_not_wait_for_the_deadline() -> None:
    config = EngineConfig.resolve(EngineArgs(model=str(DEMO), device="cpu", startup_timeout_s=600))
    context: zmq.Context[Any] = zmq.Context()
    group: Any = BrokenGroup()

    async def start() -> None:
        lane = LaneSupervisor(config, "lane-a", context, group, [], Sink())
        try:
            await asyncio.wait_for(lane.start(), 10)
        finally:
            lane.close()

    with pytest.raises(RuntimeError, match="lane-a lost its supervisor.*the disk is gone"):
        asyncio.run(start())
    context.term()


def test_a_lane_that_is_not_whole_in_time_says_what_it_waits_for() -> None:
    config = EngineConfig.resolve(EngineArgs(model=str(DEMO), device="cpu", startup_timeout_s=0.05))
    context: zmq.Context[Any] = zmq.Context()

    class SlowGroup:
        async def states(self) -> AsyncIterator[GroupState]:
            yield GroupState(1, reason="loading")
            await asyncio.Event().wait()

    group: Any = SlowGroup()

    async def start() -> None:
        lane = LaneSupervisor(config, "lane-a", context, group, [], Sink())
        try:
            await lane.start()
        finally:
            lane.close()

    with pytest.raises(TimeoutError, match=r"lane-a was not whole within 0.1 s: stage 0 \(loading\)"):
        asyncio.run(start())
    context.term()

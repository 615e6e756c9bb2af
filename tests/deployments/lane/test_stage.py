"""A lease, as far as it needs no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stagemesh.deployments.lane.stage import LeaseRefused, Stage
from stagemesh.deployments.lane.worker_group import GroupState


class Group:
    def __init__(self) -> None:
        self.num_stops = 0

    async def states(self) -> AsyncIterator[GroupState]:
        yield GroupState(1, reason="loading")
        await asyncio.Event().wait()

    async def stop_run(self) -> None:
        self.num_stops += 1

    def check_health(self) -> None:
        raise RuntimeError("gave up")

    def close(self) -> None: ...


class Leader:
    def __init__(self) -> None:
        self.is_dead = False
        self.__ray_ready__ = SimpleNamespace(remote=self._ready)

    async def _ready(self) -> None:
        if self.is_dead:
            raise ray.exceptions.RayActorError


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("stagemesh.deployments.lane.stage.LEADER_CHECK_PERIOD_S", 0.01)
    stage = Stage.__new__(Stage)
    stage._stage, stage._group, stage._fingerprint = 1, Group(), "fp_1"  # type: ignore[assignment]
    return stage


def test_a_leader_of_another_version_gets_no_lease(stage: Any) -> None:
    async def lease() -> None:
        await anext(stage.lease(Leader(), "lane-a", "fp_2"))

    with pytest.raises(LeaseRefused, match="lane lane-a has fingerprint fp_2, this replica of stage 1 has fp_1"):
        asyncio.run(lease())


def test_when_the_leader_dies_its_run_is_stopped_before_the_lease_ends(stage: Any) -> None:
    async def lease() -> None:
        leader = Leader()
        lease = stage.lease(leader, "lane-a", "fp_1")
        assert (await anext(lease)).generation == 1
        assert stage._group.num_stops == 0
        leader.is_dead = True
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(lease), 10)
        assert stage._group.num_stops == 1

    asyncio.run(lease())


def test_a_lease_that_is_given_back_stops_the_run_too(stage: Any) -> None:
    async def lease() -> None:
        lease = stage.lease(Leader(), "lane-a", "fp_1")
        await anext(lease)
        waiting = asyncio.create_task(anext(lease))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert stage._group.num_stops == 1

    asyncio.run(lease())


def test_a_stage_is_as_healthy_as_its_workers(stage: Any) -> None:
    with pytest.raises(RuntimeError, match="gave up"):
        asyncio.run(stage.check_health())

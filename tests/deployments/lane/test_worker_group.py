"""A group of workers that die, with stand-ins for the actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from support.harness import DEMO

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.deployments.lane.worker_group import MAX_REPAIRS, WorkerGroup


class Actor:
    """A ShardWorker; `load` does what a test says."""

    def __init__(self, load: Callable[[], None]) -> None:
        self.died = asyncio.Event()
        self.stopped: list[int | None] = []
        self.is_silent = False
        for name in ("pid", "profile", "watch", "stop"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))
        self.load = SimpleNamespace(remote=self._load)
        self._do_load = load

    async def _pid(self) -> int:
        return 1

    async def _load(self) -> None:
        self._do_load()

    async def _profile(self) -> int:
        return 8

    async def _watch(self) -> None:
        await self.died.wait()
        raise ray.exceptions.ActorDiedError

    async def _stop(self, epoch: int | None) -> None:
        if self.is_silent:
            await asyncio.Event().wait()
        self.stopped.append(epoch)


class Actors:
    """What a group spawns, in order. `loads` are done by those that come next; after them loading works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spawned: list[Actor] = []
        self.killed: list[Actor] = []
        self.loads: list[Callable[[], None]] = []
        monkeypatch.setattr(WorkerGroup, "_spawn", lambda group, tp_rank: self._spawn())
        monkeypatch.setattr(ray, "kill", self.killed.append)
        monkeypatch.setattr("stagemesh.deployments.lane.worker_group.RESPAWN_PAUSE_S", 0.001)
        monkeypatch.setattr("stagemesh.deployments.lane.worker_group.STOP_TIMEOUT_S", 0.1)

    def _spawn(self) -> Actor:
        self.spawned.append(Actor(self.loads.pop(0) if self.loads else lambda: None))
        return self.spawned[-1]


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    return Actors(monkeypatch)


def no_room() -> None:
    raise MemoryError("no room")


def with_group(test: Callable[[WorkerGroup], Any]) -> None:
    config = EngineConfig.resolve(EngineArgs(model=str(DEMO), device="cpu", tensor_parallel_size=2))

    async def run() -> None:
        group = WorkerGroup(config, 1)
        await group.start()
        try:
            async with asyncio.timeout(10):
                await test(group)
        finally:
            group.close()

    asyncio.run(run())


def test_a_dead_worker_is_replaced_and_the_other_stays(actors: Actors) -> None:
    async def test(group: WorkerGroup) -> None:
        states = group.states()
        first = await anext(states)
        actors.loads += [no_room] * (MAX_REPAIRS - 1)
        actors.spawned[1].died.set()
        assert not (await anext(states)).is_up
        whole = await anext(states)
        assert whole.workers[0] is first.workers[0] and whole.workers[1] is actors.spawned[-1]
        group.check_health()

    with_group(test)


def test_a_group_that_cannot_replace_a_worker_gives_up_and_says_so(actors: Actors) -> None:
    async def test(group: WorkerGroup) -> None:
        actors.loads += [no_room] * 100
        actors.spawned[0].died.set()
        async for state in group.states():
            if "no room" in state.reason:
                break
        with pytest.raises(RuntimeError, match=f"stage 1 gave up after {MAX_REPAIRS} attempts: .*no room"):
            group.check_health()
        await asyncio.sleep(0.1)
        assert len(actors.spawned) == 2 + MAX_REPAIRS
        assert actors.killed == [actors.spawned[0], *actors.spawned[2:]], "none is left, half dead or half made"

    with_group(test)


def test_a_repair_that_ends_by_a_mistake_is_no_secret(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(group: WorkerGroup) -> None:
        def spawn(group: WorkerGroup, tp_rank: int) -> Actor:
            raise ValueError("no such bundle")

        monkeypatch.setattr(WorkerGroup, "_spawn", spawn)
        actors.spawned[0].died.set()
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError, match="stage 1 is no longer repaired.*no such bundle"):
            group.check_health()

    with_group(test)


def test_whatever_runs_is_stopped_and_who_does_not_answer_is_killed(actors: Actors) -> None:
    async def test(group: WorkerGroup) -> None:
        actors.spawned[1].is_silent = True
        await group.stop_run()
        assert actors.spawned[0].stopped == [None]
        assert actors.killed == [actors.spawned[1]]

    with_group(test)

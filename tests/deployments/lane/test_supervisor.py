"""The supervisor of a lane, as far as it needs no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from support.harness import DEMO

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.fingerprint import fingerprint
from stagemesh.deployments.lane.rendezvous import PhaseError
from stagemesh.deployments.lane.stage import LeaseRefused
from stagemesh.deployments.lane.supervisor import LaneSupervisor
from stagemesh.deployments.lane.worker_group import GroupState
from stagemesh.stages.messages.request import LaneStats, TokenDelta
from stagemesh.stages.messages.wiring import Progress


class Sink:
    """Listens to nothing: no token comes."""

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        return True

    def publish(self, stats: LaneStats) -> None:
        pass

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        return set()


class Group:
    """A WorkerGroup that is loaded."""

    async def start(self) -> None: ...

    def check_health(self) -> None: ...


class BrokenGroup(Group):
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

    class SlowGroup(Group):
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


def test_a_stage_that_cannot_load_ends_the_start_while_leases_wait() -> None:
    class NoRoom(Group):
        async def start(self) -> None:
            raise PhaseError("weights", {(0, 0): "MemoryError: no room"})

    async def start(lane: LaneSupervisor) -> None:
        await asyncio.wait_for(lane.start(), 10)

    with pytest.raises(PhaseError, match="no room"):
        with_lane(start, NoRoom(), [Pool(0)])


def test_a_group_that_cannot_be_repaired_makes_the_lane_unhealthy() -> None:
    class GaveUp(Group):
        def check_health(self) -> None:
            raise RuntimeError("stage 0 gave up")

    async def check(lane: LaneSupervisor) -> None:
        lane.check_health()

    with pytest.raises(RuntimeError, match="stage 0 gave up"):
        with_lane(check, GaveUp())


# -- leases ----------------------------------------------------------------------------------------------


class Lost(Exception):
    """The replica died."""


class Lease:
    """The stream of a `lease` call: waits for a free replica, then holds it."""

    def __init__(self, pool: Pool, lane: str) -> None:
        self.pool, self.lane = pool, lane
        self.lost = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[GroupState]:
        if self.pool.refusals:
            raise self.pool.refusals.pop()
        await self.pool.free.acquire()
        self.pool.held_by.append(self)
        try:
            yield GroupState(1, reason="loading")  # held, not up
            await self.lost.wait()
            raise Lost
        finally:
            self.pool.held_by.remove(self)
            self.pool.free.release()

    def cancel(self) -> None: ...


class Pool:
    """The handle of a later stage's deployment."""

    def __init__(self, num_replicas: int) -> None:
        self.free = asyncio.Semaphore(num_replicas)
        self.held_by: list[Lease] = []
        self.asked: list[tuple[str, str]] = []
        self.refusals: list[Exception] = []
        self.lease = self

    def options(self, stream: bool) -> Pool:
        return self

    def remote(self, leader: object, lane: str, fingerprint: str) -> Lease:
        self.asked.append((lane, fingerprint))
        return Lease(self, lane)

    @property
    def lanes(self) -> list[str]:
        return [lease.lane for lease in self.held_by]


class LoadingGroup(Group):
    async def states(self) -> AsyncIterator[GroupState]:
        yield GroupState(1, reason="loading")
        await asyncio.Event().wait()


def with_lane(test: Callable[..., Awaitable[None]], group: Any, pools: Sequence[Any] = (), names: str = "a") -> None:
    """Run `test` with one lane per letter of `names`, all on these pools."""
    config = EngineConfig.resolve(EngineArgs(model=str(DEMO), device="cpu", startup_timeout_s=600))
    context: zmq.Context[Any] = zmq.Context()

    async def run() -> None:
        lanes = [LaneSupervisor(config, name, context, group, pools, Sink()) for name in names]
        try:
            await test(*lanes)
        finally:
            for lane in lanes:
                lane.close()
            context.term()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, and a leader without Ray."""
    for name, seconds in {"RETRY_PAUSE_S": 0.01, "REFUSED_PAUSE_S": 0.01, "LEASE_PATIENCE_S": 0.2}.items():
        monkeypatch.setattr(f"stagemesh.deployments.lane.supervisor.{name}", seconds)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(current_actor="leader"))


def test_a_later_stage_is_asked_for_when_the_earlier_one_is_leased(quick: None) -> None:
    async def test(lane: LaneSupervisor) -> None:
        start = asyncio.create_task(lane.start())
        await until(lambda: bool(pools[0].asked))
        await asyncio.sleep(0.1)
        assert pools[1].asked == []
        pools[0].free.release()
        await until(lambda: pools[1].lanes == ["a"])
        assert pools[0].asked == pools[1].asked == [("a", fingerprint(lane._config))]
        start.cancel()

    pools = [Pool(0), Pool(1)]
    with_lane(test, LoadingGroup(), pools)


def test_lanes_that_wait_for_each_other_do_not_wait_for_ever(quick: None) -> None:
    async def test(first: LaneSupervisor, second: LaneSupervisor) -> None:
        starts = [asyncio.create_task(first.start())]
        await until(lambda: pools[1].lanes == ["a"])
        starts.append(asyncio.create_task(second.start()))
        await until(lambda: len(pools[0].asked) == 2)
        pools[0].held_by[0].lost.set()  # the replica that comes in its place goes to the second lane
        await until(lambda: pools[0].lanes == ["b"])
        assert pools[1].lanes == ["a"]
        await until(lambda: pools[1].lanes == ["b"])
        pools[0].free.release()
        pools[1].free.release()
        await until(lambda: pools[0].lanes == pools[1].lanes == ["b", "a"])
        for start in starts:
            start.cancel()

    pools = [Pool(1), Pool(1)]
    with_lane(test, LoadingGroup(), pools, names="ab")


def test_a_stage_that_is_soon_leased_again_costs_no_other_lease(quick: None) -> None:
    async def test(lane: LaneSupervisor) -> None:
        start = asyncio.create_task(lane.start())
        await until(lambda: pools[1].lanes == ["a"])
        pools[0].held_by[0].lost.set()
        await until(lambda: len(pools[0].asked) == 2 and pools[0].lanes == ["a"])
        await asyncio.sleep(0.3)
        assert len(pools[1].asked) == 1
        start.cancel()

    pools = [Pool(1), Pool(1)]
    with_lane(test, LoadingGroup(), pools)


def test_a_refused_lease_is_named_and_asked_for_again(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagemesh.deployments.lane.supervisor.REFUSED_PAUSE_S", 0.1)

    async def test(lane: LaneSupervisor) -> None:
        start = asyncio.create_task(lane.start())
        await until(lambda: "stage 1 (the lease was refused: fp_1 is not fp_2)" in lane._waiting_for())
        await until(lambda: pools[0].lanes == ["a"])
        start.cancel()

    pools = [Pool(1)]
    pools[0].refusals.append(LeaseRefused("fp_1 is not fp_2"))
    with_lane(test, LoadingGroup(), pools)


def test_an_epoch_is_above_what_any_worker_has_seen() -> None:
    class Worker:
        def __init__(self, epoch: int) -> None:
            async def remote() -> Progress:
                return Progress(0, 0, epoch, 0, "idle", 0.0)

            self.progress = SimpleNamespace(remote=remote)

    async def test(lane: LaneSupervisor) -> None:
        ahead = 2**62
        assert await lane._next_epoch({(0, 0): Worker(5), (0, 1): Worker(ahead)}) == ahead + 1
        first, second = [await lane._next_epoch({(0, 0): Worker(5)}) for _ in range(2)]
        assert 5 < first != second > 5

    with_lane(test, Group())

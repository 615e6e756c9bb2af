"""The start of an epoch, with stand-ins for the actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import zmq
from support.harness import DEMO

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.deployments.lane.rendezvous import PhaseError, start_epoch
from stagemesh.stages.messages.channel import LeaderChannel
from stagemesh.stages.messages.wiring import Endpoints, Wiring


class Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    async def remote(self, *args: Any) -> Any:
        return self._function(*args)


class Actor:
    """A ShardWorker as far as an epoch's start needs it."""

    def __init__(self, stage: int, tp_rank: int, log: list[str]) -> None:
        self.address = f"tcp://127.0.0.1:{20_000 + 10 * stage + tp_rank}"
        self.store_port = 7 if (stage, tp_rank) == (0, 0) else None
        self.connected: tuple[Wiring, Actor | None] | None = None
        self.broken = False
        self.open = Method(lambda epoch: Endpoints(self.address, self.store_port))
        self.connect = Method(self._connect)
        self.run = Method(lambda epoch: log.append(f"run {epoch}"))
        self._log = log

    def _connect(self, wiring: Wiring, next_worker: Actor | None) -> None:
        if self.broken:
            raise OSError("no route")
        self.connected = wiring, next_worker
        self._log.append("connect")


class RecordingEngine:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.channel: LeaderChannel | None = None

    def attach(self, channel: LeaderChannel, epoch: int, num_blocks: int) -> Future[None]:
        self.channel = channel
        self.log.append(f"attach {epoch} {num_blocks}")
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.term()  # hangs where a socket was left open


def start(context: zmq.Context[Any], engine: Any, actors: dict[tuple[int, int], Actor]) -> list[tuple[int, int]]:
    """The ranks whose run loops were started."""
    config = EngineConfig.resolve(EngineArgs(model=str(DEMO), device="cpu", startup_timeout_s=10))

    async def run() -> list[tuple[int, int]]:
        runs = await start_epoch(config, context, engine, 3, actors, 64)
        await asyncio.gather(*runs.values())
        return list(runs)

    return asyncio.run(run())


def test_an_epoch_starts_with_all_ranks_connected_then_running_then_the_engine(context: zmq.Context[Any]) -> None:
    log: list[str] = []
    engine = RecordingEngine(log)
    # Of later stages first: the order of the ranks must not matter.
    actors = {(stage, tp_rank): Actor(stage, tp_rank, log) for stage in (1, 0) for tp_rank in (1, 0)}
    assert start(context, engine, actors) == list(actors)
    assert engine.channel is not None
    wiring = Wiring(
        epoch=3,
        store_host="127.0.0.1",
        store_port=7,
        results_to=engine.channel.address,
        sampled_tokens_to=(actors[0, 0].address, actors[0, 1].address),
        num_blocks=64,
    )
    for (stage, tp_rank), actor in actors.items():
        assert actor.connected == (wiring, actors.get((stage + 1, tp_rank)))
    assert log[:4] == ["connect"] * 4 and sorted(log[4:]) == ["attach 3 64", *["run 3"] * 4]
    engine.channel.close()


def test_a_rank_that_cannot_connect_is_named_and_no_socket_stays_open(context: zmq.Context[Any]) -> None:
    log: list[str] = []
    actors = {(stage, 0): Actor(stage, 0, log) for stage in (0, 1)}
    actors[1, 0].broken = True
    with pytest.raises(PhaseError, match="phase 'rendezvous' failed at stage 1 rank 0: OSError: no route"):
        start(context, RecordingEngine(log), actors)
    assert "run 3" not in log and "attach 3 64" not in log

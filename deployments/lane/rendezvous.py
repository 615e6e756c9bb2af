"""The start of an epoch; calls to all ranks with one deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.engine.engine import Engine
from stagemesh.stages.messages.channel import LeaderChannel
from stagemesh.stages.messages.wiring import Progress, Rank, make_wiring

logger = logging.getLogger("ray.serve")

Reply = TypeVar("Reply")
OPEN_TIMEOUT_S = 20.0
"""A worker opens an epoch at once, or after the end of the one before, for which it waits a few seconds."""
PROGRESS_TIMEOUT_S = 2.0
MAX_ERROR_CHARS = 600
"""The end of a remote traceback names the error."""


class PhaseError(RuntimeError):
    """Names the phase of a start-up, and stage and rank of every failure."""

    def __init__(self, phase: str, failures: Mapping[Rank, str]) -> None:
        self.phase = phase
        self.failures = dict(failures)
        who = "; ".join(f"stage {stage} rank {rank}: {why}" for (stage, rank), why in failures.items())
        super().__init__(f"phase '{phase}' failed at {who}")

    def __reduce__(self) -> tuple[type[PhaseError], tuple[str, dict[Rank, str]]]:
        return type(self), (self.phase, self.failures)


async def start_epoch(
    config: EngineConfig,
    context: zmq.Context[zmq.Socket[bytes]],
    engine: Engine,
    epoch: int,
    workers: Mapping[Rank, Any],
    num_blocks: int,
) -> dict[Rank, asyncio.Task[None]]:
    """Connect all ranks, start their run loops, attach the engine: then the lane serves.

    workers: ShardWorkers, all loaded; what they still run of an earlier epoch ends. Returns the run loop of each, which
    ends with the epoch; with an error if the rank failed or lost a peer. Raises PhaseError.
    """
    timeout_s = config.startup_timeout_s
    opened = {rank: worker.open.remote(epoch) for rank, worker in workers.items()}
    endpoints = await gather_ranks("open", opened, min(timeout_s, OPEN_TIMEOUT_S))
    channel = LeaderChannel(context, ray.util.get_node_ip_address())
    try:
        wiring = make_wiring(epoch, endpoints, channel.address, num_blocks)
        connected = {
            (stage, tp_rank): worker.connect.remote(wiring, workers.get((stage + 1, tp_rank)))
            for (stage, tp_rank), worker in workers.items()
        }
        await gather_ranks("rendezvous", connected, timeout_s)
    except BaseException:
        channel.close()
        raise
    channel.connect([endpoints[rank].plan_address for rank in workers])
    runs = {rank: asyncio.ensure_future(worker.run.remote(epoch)) for rank, worker in workers.items()}
    await asyncio.wrap_future(engine.attach(channel, epoch, num_blocks))
    return runs


async def gather_ranks(phase: str, calls: Mapping[Rank, Awaitable[Reply]], timeout_s: float) -> dict[Rank, Reply]:
    """One reply per rank. Raises PhaseError at the first failure, which may block the others, or at the deadline."""
    tasks = {rank: asyncio.ensure_future(call) for rank, call in calls.items()}
    _, pending = await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    failures: dict[Rank, str] = {}
    for rank, task in tasks.items():
        if task in pending:
            task.cancel()
        elif (error := task.exception()) is not None:
            failures[rank] = f"{type(error).__name__}: {_ending(str(error).strip())}"
    if not failures:
        failures = {rank: f"no answer within {timeout_s:g} s" for rank, task in tasks.items() if task in pending}
    if failures:
        raise PhaseError(phase, failures)
    return {rank: task.result() for rank, task in tasks.items()}


async def progress(workers: Mapping[Rank, Any]) -> dict[Rank, Progress | None]:
    """What every ShardWorker is doing; None for no answer within PROGRESS_TIMEOUT_S."""
    calls = {rank: asyncio.ensure_future(worker.progress.remote()) for rank, worker in workers.items()}
    await asyncio.wait(calls.values(), timeout=PROGRESS_TIMEOUT_S)
    progress_of = {}
    for rank, call in calls.items():
        progress_of[rank] = call.result() if call.done() and call.exception() is None else None
        call.cancel()
    return progress_of


@contextmanager
def timed(who: str, phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    logger.info("%s: %s took %.2f s", who, phase, time.monotonic() - started)


def _ending(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARS else "…" + text[-MAX_ERROR_CHARS:]

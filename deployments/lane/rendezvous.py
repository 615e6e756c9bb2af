"""Calls to several ranks at once, with a deadline that names who is late and in which phase."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.messages.channel import LeaderChannel
from stagemesh.stages.messages.wiring import Progress, Wiring

logger = logging.getLogger("ray.serve")

Rank = tuple[int, int]
"""(stage, tp_rank)"""
Answer = TypeVar("Answer")
PROGRESS_TIMEOUT_S = 2.0


class PhaseError(RuntimeError):
    """A phase of a lane's start-up failed or ran out of time; the message names stage, rank and phase."""

    def __init__(self, phase: str, failures: Mapping[Rank, str]) -> None:
        self.phase = phase
        self.failures = dict(failures)
        who = "; ".join(f"stage {stage} rank {rank}: {why}" for (stage, rank), why in failures.items())
        super().__init__(f"phase '{phase}' failed at {who}")

    def __reduce__(self) -> tuple[type[PhaseError], tuple[str, dict[Rank, str]]]:
        return type(self), (self.phase, self.failures)


async def gather_ranks(phase: str, calls: Mapping[Rank, Awaitable[Answer]], timeout_s: float) -> dict[Rank, Answer]:
    """Wait for one answer per rank. As soon as one fails, or at the deadline, raises PhaseError.

    Where one rank's failure makes the others wait for ever, the first failure is the one worth naming.
    """
    tasks = {rank: asyncio.ensure_future(call) for rank, call in calls.items()}
    _, pending = await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
    failures: dict[Rank, str] = {}
    for rank, task in tasks.items():
        if task in pending:
            task.cancel()
        elif (error := task.exception()) is not None:
            failures[rank] = f"{type(error).__name__}: {_first_lines(str(error))}"
    if not failures:
        failures = {rank: f"no answer within {timeout_s:g} s" for rank, task in tasks.items() if task in pending}
    if failures:
        raise PhaseError(phase, failures)
    return {rank: task.result() for rank, task in tasks.items()}


async def progress(workers: Mapping[Rank, Any]) -> dict[Rank, Progress | None]:
    """What every ShardWorker is doing; None for one that does not answer within PROGRESS_TIMEOUT_S."""
    asked = {rank: asyncio.ensure_future(worker.progress.remote()) for rank, worker in workers.items()}
    await asyncio.wait(asked.values(), timeout=PROGRESS_TIMEOUT_S)
    answers = {}
    for rank, task in asked.items():
        answers[rank] = task.result() if task.done() and task.exception() is None else None
        task.cancel()
    return answers


def _first_lines(text: str, limit: int = 600) -> str:
    """The end of a remote traceback says what went wrong; the rest is in that process's log."""
    text = text.strip()
    return text if len(text) <= limit else "…" + text[-limit:]


@contextmanager
def timed(who: str, phase: str) -> Iterator[None]:
    """Log how long a phase took."""
    started = time.monotonic()
    yield
    logger.info("%s: %s took %.2f s", who, phase, time.monotonic() - started)


async def wire(
    config: EngineConfig,
    context: zmq.Context[zmq.Socket[bytes]],
    host: str,
    epoch: int,
    workers: Mapping[Rank, Any],
    num_blocks: int,
) -> LeaderChannel:
    """Open sockets on every rank, then let all of them meet; returns the leader's connected end.

    workers: the ShardWorker actors, all of them loaded and none running. Raises PhaseError.
    """
    timeout_s = config.startup_timeout_s
    endpoints = await gather_ranks(
        "open", {rank: worker.open.remote(epoch) for rank, worker in workers.items()}, timeout_s
    )
    channel = LeaderChannel(context, host)
    first = endpoints[0, 0]
    wiring = Wiring(
        epoch=epoch,
        store_host=first.plan_address.removeprefix("tcp://").rpartition(":")[0],
        store_port=first.store_port or 0,
        results_to=channel.address,
        sampled_tokens_to=tuple(endpoints[0, tp_rank].plan_address for tp_rank in range(config.plan.tp_size)),
        num_blocks=num_blocks,
    )
    try:
        await gather_ranks(
            "rendezvous",
            {
                (stage, tp_rank): worker.connect.remote(wiring, workers.get((stage + 1, tp_rank)))
                for (stage, tp_rank), worker in workers.items()
            },
            timeout_s,
        )
    except PhaseError:
        channel.close()
        raise
    channel.connect([endpoints[rank].plan_address for rank in workers])
    return channel

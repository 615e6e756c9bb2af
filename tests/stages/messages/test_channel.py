"""The sockets of a lane: bounds, and what floods do to those who wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from stagemesh.stages.messages.channel import MAX_UNREAD_MESSAGES, LeaderChannel, WorkerChannel
from stagemesh.stages.messages.step import StopRun


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def worker(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[WorkerChannel]:
    worker = WorkerChannel(context, "127.0.0.1")
    yield worker
    worker.close()


def test_a_worker_takes_all_that_has_come(context, worker) -> None:
    leader = LeaderChannel(context, "127.0.0.1")
    try:
        leader.connect([worker.address])
        assert worker.receive(0) == []
        for epoch in (1, 2, 3):
            leader.send(StopRun(epoch))
        taken = []
        while len(taken) < 3:
            messages = worker.receive(5_000)
            assert messages, "no message came in 5 s"
            taken += messages
        assert taken == [StopRun(1), StopRun(2), StopRun(3)]
    finally:
        leader.close()


def test_a_flood_of_garbage_keeps_no_message_waiting(context, worker) -> None:
    """It is read as fast as the sender's own messages are, not one of each."""
    flood = context.socket(zmq.PUSH)
    leader = LeaderChannel(context, "127.0.0.1")
    try:
        flood.setsockopt(zmq.LINGER, 0)
        flood.setsockopt(zmq.SNDTIMEO, 5_000)
        flood.connect(worker.address)
        leader.connect([worker.address])
        for _ in range(MAX_UNREAD_MESSAGES):
            flood.send(b"garbage")
        assert flood.poll(5_000, zmq.POLLOUT)
        leader.send(StopRun(7))
        for _turn in range(20):  # as many as it may take for both to have arrived
            if worker.receive(1_000):
                break
        else:
            pytest.fail("the message did not come")
        for _ in range(MAX_UNREAD_MESSAGES):
            flood.send(b"garbage")  # all that was sent before has been read, or this would time out
    finally:
        flood.close()
        leader.close()

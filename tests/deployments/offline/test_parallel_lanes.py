"""Several lanes behind one `LLM`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.offline.parallel_lanes import ParallelLanes
from stagemesh.stages.messages.request import EngineRequest, RequestSummary


class FakeLane:
    engine: Any = None
    num_blocks = 0

    def __init__(self, blocks: int, error: Exception | None = None) -> None:
        self._blocks = blocks
        self._error = error
        self.running: dict[str, Future[RequestSummary]] = {}
        self.aborted: list[str] = []
        self.is_closed = False

    def start(self) -> None:
        if self._error is not None:
            raise self._error
        self.num_blocks = self._blocks

    def generate(self, request: EngineRequest) -> Future[RequestSummary]:
        done: Future[RequestSummary] = Future()
        self.running[request.request_id] = done
        return done

    def abort(self, request_id: str) -> Future[None]:
        self.aborted.append(request_id)
        return Future()

    def close(self) -> None:
        self.is_closed = True


def request(id: str, num_tokens: int) -> EngineRequest:
    return EngineRequest(id, [1] * num_tokens, SamplingParams(max_tokens=10, seed=0))


def test_a_request_goes_to_the_lane_with_the_fewest_tokens_to_do() -> None:
    lanes = [FakeLane(8), FakeLane(6)]
    both = ParallelLanes(lanes)
    both.start()
    assert both.num_blocks == 6
    for id, num_tokens in [("long", 100), ("a", 10), ("b", 10), ("c", 10)]:
        both.generate(request(id, num_tokens))
    assert [list(lane.running) for lane in lanes] == [["long"], ["a", "b", "c"]]
    lanes[0].running["long"].set_result(RequestSummary("long", 10, "stop"))
    both.generate(request("d", 10))
    assert "d" in lanes[0].running
    for id in ("b", "long", "never came"):
        both.abort(id)
    assert [lane.aborted for lane in lanes] == [[], ["b"]], "what has ended or never came is no error"


def test_if_a_lane_cannot_start_all_are_closed() -> None:
    lanes = [FakeLane(8), FakeLane(8, MemoryError("no room")), FakeLane(8)]
    with pytest.raises(MemoryError, match="no room"):
        ParallelLanes(lanes).start()
    assert all(lane.is_closed for lane in lanes)

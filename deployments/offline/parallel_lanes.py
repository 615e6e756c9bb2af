"""Data parallelism in a script: several lanes, each a whole copy of the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from stagemesh.stages.engine.engine import Engine
from stagemesh.stages.engine.lane import Lane
from stagemesh.stages.messages.request import EngineRequest, RequestSummary


class OfflineLane(Lane, Protocol):
    engine: Engine


class ParallelLanes(Lane):
    """A lane made of lanes: a request goes to the one that has the fewest tokens to do."""

    def __init__(self, lanes: Sequence[OfflineLane]) -> None:
        self.lanes = lanes
        self.num_blocks = 0
        """Of each lane, at least."""
        self._lock = threading.Lock()
        self._num_tokens = [0] * len(lanes)
        """Prompt and most tokens of the answer, of the requests that each lane has."""
        self._lane_of: dict[str, OfflineLane] = {}

    def start(self) -> None:
        """Raises what a lane raises; the others are then closed."""
        try:
            self.lanes[0].start()  # alone, because it may start Ray
            with ThreadPoolExecutor(len(self.lanes)) as threads:
                list(threads.map(lambda lane: lane.start(), self.lanes[1:]))
        except BaseException:
            self.close()
            raise
        self.num_blocks = min(lane.num_blocks for lane in self.lanes)

    def generate(self, request: EngineRequest) -> Future[RequestSummary]:
        num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
        with self._lock:
            i = min(range(len(self.lanes)), key=self._num_tokens.__getitem__)
            self._num_tokens[i] += num_tokens
            self._lane_of[request.request_id] = self.lanes[i]

        def ended(_: Future[RequestSummary]) -> None:
            with self._lock:
                self._num_tokens[i] -= num_tokens
                self._lane_of.pop(request.request_id, None)

        done = self.lanes[i].generate(request)
        done.add_done_callback(ended)
        return done

    def abort(self, request_id: str) -> Future[None]:
        with self._lock:
            lane = self._lane_of.get(request_id)
        if lane is not None:
            return lane.abort(request_id)
        unknown: Future[None] = Future()
        unknown.set_result(None)
        return unknown

    def close(self) -> None:
        for lane in reversed(self.lanes):  # the first may own Ray
            lane.close()

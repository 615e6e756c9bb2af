"""What a lane is to those who send it requests: four verbs and what they may rely on. No torch, no Ray."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from stagemesh.stages.messages.request import EngineRequest, RequestSummary


class StepTimeout(TimeoutError):
    """A step had no result within `step_timeout_s`: one of the lane's ranks is stuck."""


class Lane(Protocol):
    """One whole copy of the model. Tokens go to the TokenSink that the lane was made with.

    1. `start` comes first, and once. The lane is ready when it returns; where it raises, nothing that it began is left.
    2. `generate` may be called from any thread, for any number of requests at once, and never raises. Its future cannot
       be cancelled and ends with the request: a RequestSummary, ConfigError for a request that is refused, or
       RuntimeError for one that `close` cut off or that came later.
    3. When the future ends, the sink has had all tokens of the request, in order and each of them once.
    4. `abort` ends a request with finish_reason "abort", and its blocks are free before the next step. An id that is
       unknown or has ended is no error.
    5. A lane that can run no further step says so once, to the `on_failure` it was made with. Its requests stay open
       until `close`.
    6. `close` ends every thread, process and socket of the lane. It may be called twice, before `start`, and after a
       `start` that failed.

    In process: `deployments/offline/local_lane.py`; Ray actors for a script: `ray_lane.py` beside it. The served lane,
    `deployments/lane/leader.py`, has the same verbs as coroutines: it awaits what is a future here, a cancelled call of
    `generate` is an `abort`, and instead of failing (5) it heals.
    """

    num_blocks: int
    """KV blocks; known when `start` has returned."""

    def start(self) -> None: ...

    def generate(self, request: EngineRequest) -> Future[RequestSummary]: ...

    def abort(self, request_id: str) -> Future[None]: ...

    def close(self) -> None: ...

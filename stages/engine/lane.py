"""The contract of a lane: four verbs, and what callers may rely on."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from stagemesh.stages.messages.request import EngineRequest, RequestSummary


class StepTimeout(TimeoutError):
    """A step had no result within `step_timeout_s`: one of the lane's ranks is stuck."""


class Lane(Protocol):
    """One whole copy of the model. Tokens go to the TokenSink that the lane was made with.

    1. `start` comes first, and once. The lane is ready when it returns; if it raises, nothing it began remains.
    2. `generate` may be called from any thread, and never raises. Its future cannot be cancelled and ends with the
       request: a RequestSummary, ConfigError if the request is refused, RuntimeError if `close` came first.
    3. Before the future ends, the sink has all tokens of the request, in order, each once.
    4. `abort` ends a request with finish_reason "abort"; its blocks are free before the next step. An id that is
       unknown or has ended is no error.
    5. A lane that can run no further step calls `on_failure` once. Its requests stay open until `close`.
    6. `close` ends every thread, process and socket of the lane. It may be called twice, before `start`, and after a
       `start` that failed.

    `deployments/offline/` has one in process and one of Ray actors. The served lane, `deployments/lane/leader.py`, has
    these verbs as coroutines: a cancelled call of `generate` is an `abort`, and instead of failing (5) it heals.
    """

    num_blocks: int
    """KV blocks; known after `start`."""

    def start(self) -> None: ...

    def generate(self, request: EngineRequest) -> Future[RequestSummary]: ...

    def abort(self, request_id: str) -> Future[None]: ...

    def close(self) -> None: ...

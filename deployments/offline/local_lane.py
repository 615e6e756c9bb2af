"""A lane of one rank inside the calling process: two threads, no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.engine.engine import Engine, TokenSink
from stagemesh.stages.engine.epoch import StepRaised
from stagemesh.stages.engine.lane import Lane
from stagemesh.stages.messages.channel import LeaderChannel
from stagemesh.stages.messages.request import EngineRequest, RequestSummary
from stagemesh.stages.messages.wiring import make_wiring, new_epoch
from stagemesh.stages.worker.worker import Worker

HOST = "127.0.0.1"
JOIN_TIMEOUT_S = 30.0


class LocalLane(Lane):
    """Calls `on_failure(reason)` from one of its own threads."""

    def __init__(
        self,
        config: EngineConfig,
        sink: TokenSink,
        on_failure: Callable[[str], None],
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        assert config.plan.tp_size * config.plan.pp_size == 1
        self._on_phase = on_phase
        self.num_blocks = 0
        self._epoch = new_epoch()
        """The only one: wired again, the same process would fail again."""
        self._worker = Worker(config, 0, 0, HOST)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel = LeaderChannel(self._context, HOST)
        # The threads keep no reference to the lane, so that it can be garbage-collected.
        self.engine = Engine(config, "local", sink, lambda _, error: on_failure(_said(error)))
        self._thread = threading.Thread(
            target=_run, args=(self._worker, self._epoch, self.engine, on_failure), name="worker", daemon=True
        )

    def start(self) -> None:
        """Raises ConfigError if the checkpoint or the memory does not fit."""
        try:
            self._on_phase("weights")
            self._worker.load()
            self._on_phase("KV cache")
            self.num_blocks = self._worker.profile()
            endpoints = self._worker.open(self._epoch)
            self._worker.connect(make_wiring(self._epoch, {(0, 0): endpoints}, self._channel.address, self.num_blocks))
            self._channel.connect([endpoints.plan_address])
            self._thread.start()
            self.engine.attach(self._channel, self._epoch, self.num_blocks).result()
        except BaseException:
            self.close()
            raise

    def generate(self, request: EngineRequest) -> Future[RequestSummary]:
        return self.engine.generate(request)

    def abort(self, request_id: str) -> Future[None]:
        return self.engine.abort(request_id)

    def close(self) -> None:
        self.engine.close()
        self._worker.stop(self._epoch)
        if self._thread.is_alive():
            self._thread.join(JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._worker.close()
        self._channel.close()
        self._context.term()


def _said(error: Exception) -> str:
    """A rank's own error names the rank itself."""
    return str(error) if isinstance(error, StepRaised) else f"{type(error).__name__}: {error}"


def _run(worker: Worker, epoch: int, engine: Engine, on_failure: Callable[[str], None]) -> None:
    try:
        worker.run(epoch)
    except Exception as error:
        engine.detach("failed")
        on_failure(f"stage 0 rank 0: {type(error).__name__}: {error}")

"""A lane of one rank inside the calling process: the engine's thread and the worker's, joined by the same channel
as anywhere else. No Ray, no other process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import zmq

from stagemesh.config.engine import EngineConfig
from stagemesh.stages.engine.engine import Engine, TokenSink
from stagemesh.stages.messages.channel import LeaderChannel
from stagemesh.stages.messages.wiring import Wiring
from stagemesh.stages.worker.worker import Worker

HOST = "127.0.0.1"
EPOCH = 1
"""The only one: what breaks here is a bug, and wiring the same process again would not mend it."""
JOIN_TIMEOUT_S = 30.0


class LocalLane:
    """`on_failure(reason)` is called once, from a thread of the lane, when it can run no further step."""

    def __init__(self, config: EngineConfig, sink: TokenSink, on_failure: Callable[[str], None]) -> None:
        """Load the model and start. Raises ConfigError where the checkpoint or the memory does not fit."""
        assert config.plan.tp_size * config.plan.pp_size == 1
        self._worker = Worker(config, 0, 0, HOST)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        channel = LeaderChannel(self._context, HOST)
        try:
            self._worker.load()
            self.num_blocks = self._worker.profile()
            endpoints = self._worker.open(EPOCH)
            self._worker.connect(
                Wiring(
                    epoch=EPOCH,
                    store_host=HOST,
                    store_port=0,
                    results_to=channel.address,
                    sampled_tokens_to=(endpoints.plan_address,),
                    num_blocks=self.num_blocks,
                )
            )
            channel.connect([endpoints.plan_address])
        except BaseException:
            self._worker.close()
            channel.close()
            self._context.term()
            raise
        # The lane's threads know each other, the sink and `on_failure`, and nobody who would keep the lane alive.
        engine = self.engine = Engine(config, "local", sink, lambda epoch, reason: on_failure(reason))
        self._thread = threading.Thread(
            target=_run, args=(self._worker, engine, on_failure), name="worker", daemon=True
        )
        self._thread.start()
        engine.attach(channel, EPOCH, self.num_blocks).result()

    def close(self) -> None:
        """End both threads; safe to call twice."""
        self.engine.close()
        self._worker.stop(EPOCH)
        self._thread.join(JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._worker.close()
        self._context.term()


def _run(worker: Worker, engine: Engine, on_failure: Callable[[str], None]) -> None:
    try:
        worker.run()
    except Exception as error:
        engine.detach("failed")
        on_failure(f"stage 0 rank 0: {type(error).__name__}: {error}")

"""What the API needs from the lanes, as protocols: implemented over Ray by the Router, faked by tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.messages.request import LaneStats, TokenDelta

LaneStatus = Literal["unavailable", "overloaded", "lost", "timeout", "internal"]


class LaneError(RuntimeError):
    """A lane could not take or finish a request. `deployments/ingress/errors.py` says what the client sees.

    status: "unavailable" no lane can generate now; "overloaded" queues are full, try again later;
    "lost" the lane died on the way; "timeout" a deadline passed; "internal" a lane broke its own protocol.
    """

    def __init__(self, status: LaneStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(status, message)

    def __str__(self) -> str:
        return self.message


TokenStream = AsyncGenerator[TokenDelta, None]
"""The answer of one request as it is generated. It ends after the delta that has a finish_reason.

`aclose()`, also by cancelling the task that waits in `__anext__`, aborts the request in its lane at once.
Closing twice, or after the end, does nothing.
"""


class LaneClient(Protocol):
    """All lanes behind one door. Called from one event loop only."""

    def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams, request_id: str) -> TokenStream:
        """Choose a lane and start the request there, at the latest when the first delta is awaited.

        `params.seed` is definite. Raises LaneError, here or while iterating.
        """
        ...

    def lane_stats(self) -> list[LaneStats]:
        """The last known state of every lane."""
        ...

    def ready(self) -> bool:
        """Whether some lane can generate now."""
        ...

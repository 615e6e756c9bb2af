"""What the frontends need from the lanes, as a protocol: implemented over Ray by lane_client.py, faked by tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from stagemesh.stages.messages.request import EngineRequest, LaneStats, TokenDelta

TokenStream = AsyncGenerator[TokenDelta, None]
"""The answer of one request as it is generated. It ends after the delta that has a finish_reason.

`aclose()`, also by cancelling the task that waits in `__anext__`, aborts the request in its lane at once.
Closing twice, or after the end, does nothing.
"""


class LaneClient(Protocol):
    """All lanes behind one router. Called from one event loop only."""

    def generate(self, request: EngineRequest) -> TokenStream:
        """Choose a lane and start the request there, at the latest when the first delta is awaited.

        Raises LaneError, here or while iterating.
        """
        ...

    def lane_stats(self) -> list[LaneStats]:
        """The last known state of every lane."""
        ...

    def ready(self) -> bool:
        """Whether some lane can generate now."""
        ...

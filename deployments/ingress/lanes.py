"""What the frontends need from the lanes; over Ray in lane_client.py, faked by tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

from stagemesh.stages.messages.request import EngineRequest, LaneStats, TokenDelta

MAX_UNREAD_DELTAS = 4096
"""Of one request, wherever they wait. A client that reads so slowly is cut off."""
TokenStream = AsyncGenerator[TokenDelta, None]
"""Tokens of one request, up to the delta that has a finish_reason.

`aclose()`, or cancelling the task that waits in `__anext__`, aborts the request at once; after the end it does nothing.
"""


class LaneClientCounts(NamedTuple):
    """Of one router, over its life."""

    resumed: int = 0
    """Times that a request went on in another lane."""
    dropped: int = 0
    """Messages and deltas that were none, of an older attempt, or belonged to nobody."""


class LaneClient(Protocol):
    """All lanes behind one router. Called from one event loop only."""

    def generate(self, request: EngineRequest) -> TokenStream:
        """Starts at the latest when the first delta is awaited. Raises LaneError, here or while iterating."""

    def lane_stats(self) -> list[LaneStats]: ...

    def ready(self) -> bool:
        """Whether some lane can generate now."""

    def counts(self) -> LaneClientCounts: ...

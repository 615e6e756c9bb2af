"""The one exception for anything a user asked for that cannot be done."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A value that a user gave is refused.

    The message names the field, the value and what would be allowed, so it can be shown to the user as it is.
    HTTP answers 400 with it, gRPC INVALID_ARGUMENT; at start-up it ends the process before anything starts.
    """

    def __init__(self, field: str, value: Any, reason: str) -> None:
        self.field = field
        self.value = value
        self.reason = reason
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:200] + "…"
        super().__init__(f"{field}={shown}: {reason}" if field else reason)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, Any, str]]:
        # Exceptions are rebuilt from `args` when they cross a process; this one has three.
        return type(self), (self.field, self.value, self.reason)

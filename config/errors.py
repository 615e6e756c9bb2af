"""The exception for whatever a user asked for that cannot be done."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A user's value is refused. The message is for the user: it names the field, the value and what is allowed.

    HTTP answers 400 with it, gRPC INVALID_ARGUMENT; at start-up it ends the process.
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
        # Pickle would rebuild it from `args`, which holds the message alone.
        return type(self), (self.field, self.value, self.reason)

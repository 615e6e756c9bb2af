"""The exception for a user's value that is refused."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """Its message names the field, the value and what is allowed. HTTP answers 400, gRPC INVALID_ARGUMENT."""

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

    def renamed(self, field: str) -> ConfigError:
        """The same error about the name that the user knows."""
        return type(self)(field, self.value, self.reason)

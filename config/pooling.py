"""How a text becomes one vector."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from stagemesh.config.errors import ConfigError

Pooling = Literal["last", "mean"]
MAX_DIMENSIONS = 2**31 - 1


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one embedding. Raises ConfigError."""

    pooling: Pooling = "last"
    """The last token's hidden state or the mean of all, after the final norm."""
    normalize: bool = True
    """Scale the vector to length 1."""
    dimensions: int | None = None
    """Keep only the first ones (Matryoshka models); normalised after the cut."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ConfigError("pooling", self.pooling, f"must be one of {', '.join(get_args(Pooling))}")
        if self.dimensions is not None and not 1 <= self.dimensions <= MAX_DIMENSIONS:
            raise ConfigError("dimensions", self.dimensions, f"must be in [1, {MAX_DIMENSIONS}]")

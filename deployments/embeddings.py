"""OpenAI's /v1/embeddings: its request and its answer. What an embedding is, is in stages/pooling.py."""

from __future__ import annotations

import base64
from typing import Any, Literal, Self

import msgspec
from pydantic import Field

from stagemesh.config.base import Settings
from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import Pooling, PoolingParams

MAX_INPUTS = 2048
"""OpenAI's limit."""


class EmbeddingRequest(Settings):
    input: str | list[str] | list[int] | list[list[int]]
    """One text or several, or their token ids."""
    model: str | None = None
    """One of the served names; may be left out."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of little-endian float32, a quarter of the size of numbers in JSON."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep this many leading dimensions, for models trained for it."""
    user: str | None = None
    """Taken, without effect."""
    pooling: Pooling | None = None
    """Ours: "last" (the default) or "mean"."""
    normalize: bool | None = None
    """Ours: vectors of length 1, the default."""
    add_special_tokens: bool | None = None
    """vLLM's: as the tokenizer does by default."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """From a JSON body. Raises ConfigError naming what is wrong."""
        try:
            content = msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise ConfigError("", None, f"the body is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError("", None, "the body must be a JSON object")
        return cls.parse(content)

    def inputs(self) -> list[str | list[int]]:
        """All inputs. Raises ConfigError where there are none, or too many."""
        given: Any = self.input
        is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
        inputs: list[str | list[int]] = [given] if is_one else given
        if not 1 <= len(inputs) <= MAX_INPUTS:
            raise ConfigError("input", len(inputs), f"must hold between 1 and {MAX_INPUTS} inputs")
        return inputs

    def params(self) -> PoolingParams:
        return PoolingParams(
            pooling=self.pooling or "last", normalize=self.normalize is not False, dimensions=self.dimensions
        )


class Embedding(msgspec.Struct, frozen=True):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(msgspec.Struct, frozen=True):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"

    @classmethod
    def of(
        cls, vectors: list[bytes], model: str, num_tokens: int, encoding_format: Literal["float", "base64"] | None
    ) -> EmbeddingResponse:
        """`vectors`: little-endian float32, in the order of the inputs."""

        def written(vector: bytes) -> list[float] | str:
            if encoding_format == "base64":
                return base64.b64encode(vector).decode()
            return list(memoryview(vector).cast("f"))

        data = [Embedding(index, written(vector)) for index, vector in enumerate(vectors)]
        return cls(data, model, EmbeddingUsage(num_tokens, num_tokens))

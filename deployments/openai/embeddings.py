"""Request and response of /v1/embeddings. Vectors come from stages/worker/pooler.py."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from pydantic import Field

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import Pooling, PoolingParams
from stagemesh.deployments.openai.schema import OpenAIRequest, one_or_many

MAX_INPUTS = 2048
"""OpenAI's limit."""


class EmbeddingRequest(OpenAIRequest):
    input: Any
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of little-endian float32."""
    dimensions: int | None = Field(default=None, ge=1)
    """Leading dimensions to keep, for models trained for it."""
    pooling: Pooling | None = None
    """Ours: "last" (the default) or "mean"."""
    normalize: bool | None = None
    """Ours: vectors of length 1, the default."""
    add_special_tokens: bool | None = None
    """vLLM's; default true."""

    @property
    def num_chars(self) -> int:
        """Of the text to tokenize."""
        return sum(len(text) for text in self.inputs() if isinstance(text, str))

    def inputs(self) -> Sequence[str | list[int]]:
        """All of one kind. Raises ConfigError."""
        inputs = one_or_many("input", self.input)
        if len(inputs) > MAX_INPUTS:
            raise ConfigError("input", len(inputs), f"must not hold more than {MAX_INPUTS} inputs")
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
        """vectors: little-endian float32, in the order of the inputs."""

        def written(vector: bytes) -> list[float] | str:
            if encoding_format == "base64":
                return base64.b64encode(vector).decode()
            return list(memoryview(vector).cast("f"))

        data = [Embedding(index, written(vector)) for index, vector in enumerate(vectors)]
        return cls(data, model, EmbeddingUsage(num_tokens, num_tokens))

"""Request and response of /v1/embeddings. Vectors come from stages/worker/pooler.py."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pydantic

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import Pooling, PoolingParams
from stagemesh.deployments.openai.conversation import ChatMessage, Conversation
from stagemesh.deployments.openai.schema import TEXTS_OR_TOKENS, Int, OpenAIRequest, one_or_many
from stagemesh.stages.text.input import Truncation

MAX_INPUTS = 2048
"""OpenAI's limit."""


class EmbeddingRequest(Conversation, OpenAIRequest):
    model_config = pydantic.ConfigDict(json_schema_extra={"anyOf": [{"required": [n]} for n in ("input", "messages")]})
    opens_turn: ClassVar[bool] = False
    messages: list[ChatMessage] = []
    """vLLM's, in place of `input`: the vector of a conversation."""
    input: Annotated[Any, pydantic.WithJsonSchema(TEXTS_OR_TOKENS)] = None
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of float32."""
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little", "big"] | None = None
    """vLLM's, of base64: the order of bytes; default little."""
    padding: Literal["do_not_pad"] | None = None
    dimensions: Int | None = None
    """Leading dimensions to keep, for models trained for it."""
    pooling: Pooling | None = None
    """Ours: "last" (the default) or "mean"."""
    normalize: bool | None = None
    """Vectors of length 1, the default; wins over vLLM's name for it, the next one."""
    use_activation: bool | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None
    """As in InferenceRequest."""

    def _check(self) -> None:
        super()._check()
        if self.messages and self.input is not None:
            raise ConfigError("messages", len(self.messages), "must not be given together with input")
        if not self.messages and self.input is None:
            raise ConfigError("input", None, "is required")

    @property
    def truncation(self) -> Truncation | None:
        if self.truncate_prompt_tokens is None:
            return None
        return Truncation(num_tokens=self.truncate_prompt_tokens, side=self.truncation_side or "left")

    @property
    def num_chars(self) -> int:
        """Of the text to tokenize."""
        if self.messages:
            return sum(message.num_chars for message in self.messages)
        return sum(len(text) for text in self.inputs() if isinstance(text, str))

    def inputs(self) -> Sequence[str | list[int]]:
        """All of one kind. Raises ConfigError."""
        inputs = one_or_many("input", self.input)
        if len(inputs) > MAX_INPUTS:
            raise ConfigError("input", len(inputs), f"must not hold more than {MAX_INPUTS} inputs")
        return inputs

    def params(self) -> PoolingParams:
        is_normal = (self.use_activation if self.normalize is None else self.normalize) is not False
        return PoolingParams(pooling=self.pooling or "last", normalize=is_normal, dimensions=self.dimensions)


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
    id: str
    created: int
    """Unix seconds."""
    object: str = "list"

    @classmethod
    def of(
        cls,
        vectors: list[bytes],
        model: str,
        num_tokens: int,
        encoding_format: Literal["float", "base64"] | None,
        *,
        is_big_endian: bool,
        id: str,
    ) -> EmbeddingResponse:
        """vectors: little-endian float32, in the order of the inputs."""

        def written(vector: bytes) -> list[float] | str:
            if encoding_format == "base64":
                numbers = array("f", vector)
                if is_big_endian:
                    numbers.byteswap()
                return base64.b64encode(numbers.tobytes()).decode()
            return list(memoryview(vector).cast("f"))

        data = [Embedding(index, written(vector)) for index, vector in enumerate(vectors)]
        return cls(data, model, EmbeddingUsage(num_tokens, num_tokens), id, int(time.time()))

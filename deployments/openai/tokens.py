"""Bodies of vLLM's routes beside OpenAI's: tokens, several conversations at once, and SageMaker's one route for all."""

from __future__ import annotations

from typing import Annotated, Any, Self, cast

import msgspec
import pydantic

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.openai.conversation import ChatMessage
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.requests import MAX_ANSWERS, ChatRequest, CompletionRequest
from stagemesh.deployments.openai.schema import OpenAIRequest


class TokenizeRequest(OpenAIRequest):
    """Either `prompt` or `messages`. What else ChatRequest has for its prompt goes with `messages`."""

    model_config = pydantic.ConfigDict(json_schema_extra={"anyOf": [{"required": [n]} for n in ("prompt", "messages")]})
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """BOS and the like; by default for a prompt and not for messages, where the template writes them."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    def _check(self) -> None:
        super()._check()
        if (self.prompt is None) == (self.messages is None):
            raise ConfigError("prompt", self.prompt, "is required, or messages, and not both")

    def chat(self) -> ChatRequest:
        """Raises ConfigError."""
        own = {"prompt", "add_special_tokens", "return_token_strs"}
        return ChatRequest.parse(self.model_dump(exclude_none=True, exclude=own))


class TokenizeResponse(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    """As the vocabulary spells them."""


class DetokenizeRequest(OpenAIRequest):
    tokens: list[int]


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str
    """Special tokens written out."""


_NOT_EMPTY = pydantic.Field(json_schema_extra={"minItems": 1})
NOT_IN_BATCHES = ("stream", "stream_options", "tools", "tool_choice", "use_beam_search", "n", "best_of")
"""Of ChatRequest's fields."""


class BatchChatRequest(OpenAIRequest):
    """The fields of ChatRequest, for several conversations. No stream, tools or n."""

    messages: list[Annotated[list[ChatMessage], _NOT_EMPTY]] = pydantic.Field(json_schema_extra={"minItems": 1})
    """The answer has one choice for each."""

    def _check(self) -> None:
        for name in ("stream", "tools", "tool_choice", "use_beam_search"):
            if (value := (self.model_extra or {}).get(name)) and value != "none":
                raise ConfigError(name, value, "is not supported for several conversations at once")
        if (n := (self.model_extra or {}).get("n")) not in (None, 1):
            raise ConfigError("n", n, "must be 1 for several conversations at once")
        if not 1 <= len(self.messages) <= MAX_ANSWERS:
            raise ConfigError("messages", len(self.messages), f"must hold 1 to {MAX_ANSWERS} conversations")

    def chats(self) -> list[ChatRequest]:
        """Raises ConfigError."""
        fields: dict[str, Any] = self.model_dump(exclude_unset=True, exclude={"messages"})
        chats: list[ChatRequest] = []
        for i, messages in enumerate(self.messages):
            try:  # the shared fields are checked once
                chat = ChatRequest.parse({"messages": messages} if chats else {**fields, "messages": messages})
            except ConfigError as error:
                raise conversation_error(i, error) from None
            chats.append(chats[0].model_copy(update={"messages": chat.messages}) if chats else chat)
        return chats


def conversation_error(i: int, error: ConfigError) -> ConfigError:
    """`error`, about a conversation's "messages[0].role", as one about "messages[i][0].role"."""
    if not error.field.startswith("messages"):
        return error
    return error.renamed(f"messages[{i}]{error.field.removeprefix('messages')}")


class InvocationRequest(OpenAIRequest):
    """SageMaker's: a chat has `messages`, a completion `prompt`, an embedding `input`."""

    @classmethod
    def parse(cls, body: bytes | dict[str, Any], **options: Any) -> Self:
        """One of the three classes. Raises ConfigError."""
        kinds: dict[str, type[OpenAIRequest]] = {
            "messages": ChatRequest,
            "prompt": CompletionRequest,
            "input": EmbeddingRequest,
        }
        fields = _Anything.parse(body).model_extra or {}
        for name, kind in kinds.items():
            if name in fields:
                return cast(Self, kind.parse(body, **options))
        raise ConfigError("messages", None, "is required, or prompt, or input")


class _Anything(OpenAIRequest):
    def _check(self) -> None:
        pass

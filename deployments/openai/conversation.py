"""Messages and tools as requests write them, and how they become a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.input import ChatInput


class TextPart(pydantic.BaseModel, extra="ignore"):
    type: Literal["text"]
    text: str


class ChatMessage(pydantic.BaseModel, extra="allow"):
    """The chat template decides which roles exist, and also gets the extra fields."""

    role: str
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())

    @property
    def num_chars(self) -> int:
        return len(self.text)


class FunctionTool(pydantic.BaseModel, extra="ignore"):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema; None for no arguments."""
    strict: bool | None = None


class Tool(pydantic.BaseModel, extra="ignore"):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(pydantic.BaseModel, extra="ignore"):
    name: str


class NamedTool(pydantic.BaseModel, extra="ignore"):
    type: Literal["function"]
    function: NamedFunction


class ToolSet(pydantic.BaseModel, extra="ignore"):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(pydantic.BaseModel, extra="ignore"):
    type: Literal["allowed_tools"]
    allowed_tools: ToolSet


class Conversation(pydantic.BaseModel):
    """How messages become a prompt."""

    opens_turn: ClassVar[bool] = True
    """The default of add_generation_prompt, unless the final message goes on."""
    messages: list[ChatMessage] = pydantic.Field(json_schema_extra={"minItems": 1})
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn."""
    continue_final_message: bool | None = None
    """The answer goes on behind the last message's content."""
    add_special_tokens: bool | None = None
    """Beside those that the template writes; default false."""
    chat_template: str | None = None
    """In place of the model's, where the server trusts its clients with it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables, e.g. {"enable_thinking": false}."""
    documents: list[dict[str, Any]] | None = None
    """For templates that know them."""

    def conversation(self, variables: Mapping[str, Any] | None = None, **fields: Any) -> ChatInput:
        """variables: for the template. fields: more of ChatInput. Raises ConfigError.

        The request's own fields win over `chat_template_kwargs`.
        """
        kwargs = dict(self.chat_template_kwargs or {})
        switches = {}
        for name in ("add_generation_prompt", "continue_final_message"):
            value, own = kwargs.pop(name, None), getattr(self, name)
            switches[name] = value if own is None else own
        goes_on, opens = bool(switches["continue_final_message"]), switches["add_generation_prompt"]
        template = kwargs.pop("chat_template", None)
        template = template if self.chat_template is None else self.chat_template
        if not isinstance(template, str | None):
            raise ConfigError("chat_template_kwargs.chat_template", template, "must be a text")
        if self.documents is not None:
            kwargs["documents"] = self.documents
        return ChatInput(
            messages=[message.model_dump() for message in self.messages],
            add_generation_prompt=self.opens_turn and not goes_on if opens is None else bool(opens),
            continue_final_message=goes_on,
            add_special_tokens=bool(self.add_special_tokens),
            chat_template=template,
            template_variables={**kwargs, **(variables or {})},
            **fields,
        )

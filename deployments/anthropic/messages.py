"""Anthropic's request for a message, the chat that it means, and the message that answers it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from pydantic import Field, WithJsonSchema

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.openai.requests import ChatRequest
from stagemesh.deployments.openai.responses_request import add_call, string, text_of_parts, warn_of_tool
from stagemesh.deployments.openai.schema import OpenAIRequest, one_type

MESSAGES_NAMES = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}
"""Of ChatRequest's fields, in error messages."""
# What the functions below take, for /openapi.json.
_TEXT = {"type": "string"}
_BLOCK = {
    "anyOf": [
        one_type("text", text=_TEXT),
        one_type("tool_use", id=_TEXT, name=_TEXT, input={"type": "object"}),
        one_type("tool_result", tool_use_id=_TEXT),
        one_type("thinking"),
    ]
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "assistant"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _BLOCK}]},
    },
    "required": ["role", "content"],
}
_TOOL = {
    "anyOf": [
        one_type("custom", name=_TEXT, input_schema={"type": "object"}),
        {"type": "object", "properties": {"type": _TEXT}, "required": ["type"]},
    ]
}
_TOOL_CHOICE = {"anyOf": [*map(one_type, ("auto", "any", "none")), one_type("tool", name=_TEXT)]}
_OUTPUT_CONFIG = {
    "type": "object",
    "properties": {"format": {"anyOf": [one_type("json_schema", schema={"type": "object"}), {"type": "null"}]}},
}


class CountTokensRequest(OpenAIRequest):
    model: str
    messages: list[Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]] = Field(json_schema_extra={"minItems": 1})
    """Of user and assistant in turn, the last of the user. Thinking is skipped."""
    system: str | list[dict[str, Any]] | None = None
    tools: list[Annotated[dict[str, Any], WithJsonSchema(_TOOL)]] | None = None
    """Tools that Anthropic's servers define are not offered to the model."""
    tool_choice: Annotated[dict[str, Any], WithJsonSchema(_TOOL_CHOICE)] | None = None
    """{"type": "auto", "any", "tool" or "none"}"""
    output_config: Annotated[dict[str, Any], WithJsonSchema(_OUTPUT_CONFIG)] | None = None
    """{"format": {"type": "json_schema", "schema": …}}"""

    def chat(self) -> ChatRequest:
        """Raises ConfigError naming fields of this request."""
        fields: dict[str, Any] = {"model": self.model, "messages": self._messages()}
        tools = [tool for i, one in enumerate(self.tools or ()) if (tool := _function(i, one)) is not None]
        choice, parallel = _tool_choice(self.tool_choice or {"type": "auto"})
        if tools or choice not in ("auto", "none"):
            fields |= {"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}
        if (format := (self.output_config or {}).get("format")) is not None:
            fields["response_format"] = _response_format(format)
        return ChatRequest.parse({**fields, **self._sampling()})

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if system := text_of_parts("system", self.system, ("text",)):
            messages.append({"role": "system", "content": system})
        for i, message in enumerate(self.messages):
            _add_message(messages, f"messages[{i}].", message)
        if messages and messages[-1]["role"] == "assistant":
            reason = "the last one must be of the user: an answer's beginning cannot be given here"
            raise ConfigError(f"messages[{len(self.messages) - 1}].role", "assistant", reason)
        return messages


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None

    def _sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream", "priority", "timeout")
        fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        return fields if self.stop_sequences is None else {**fields, "stop": self.stop_sequences}


class MessagesUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    """Without those read from the cache."""
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(msgspec.Struct, frozen=True):
    id: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    """end_turn, max_tokens, stop_sequence or tool_use"""
    stop_sequence: str | None
    usage: MessagesUsage
    role: str = "assistant"
    type: str = "message"


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what is none, because the limit of tokens cut it, as its text."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"INVALID_JSON": text}


def anthropic_error(message: str, http_status: int) -> dict[str, Any]:
    kinds = {
        401: "authentication_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        500: "api_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
    return {"type": "error", "error": {"type": kinds.get(http_status, "invalid_request_error"), "message": message}}


def _add_message(messages: list[dict[str, Any]], at: str, message: dict[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise ConfigError(at + "role", role, "must be user or assistant")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ConfigError(at + "content", content, "must be a text or a list of blocks")
    added: list[dict[str, Any]] = [{"role": role, "content": None}]
    for j, block in enumerate(content):
        _add_block(added, f"{at}content[{j}].", role, block)
    messages += [one for one in added if one["content"] is not None or one.get("tool_calls")]


def _add_block(messages: list[dict[str, Any]], at: str, role: str, block: Any) -> None:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        if messages[-1]["role"] != role:  # behind a tool's result
            messages.append({"role": role, "content": None})
        last = messages[-1]
        last["content"] = last["content"] or []
        last["content"].append({"type": "text", "text": string(at, block, "text")})
    elif kind == "tool_use" and role == "assistant":
        arguments = block.get("input")
        if not isinstance(arguments, dict):
            raise ConfigError(at + "input", arguments, "must be an object")
        add_call(messages, string(at, block, "id"), string(at, block, "name"), msgspec.json.encode(arguments).decode())
    elif kind == "tool_result" and role == "user":
        result = text_of_parts(at + "content", block.get("content"), ("text",))
        messages.append({"role": "tool", "content": result, "tool_call_id": string(at, block, "tool_use_id")})
    elif kind not in ("thinking", "redacted_thinking"):
        allowed = "text, tool_use, thinking" if role == "assistant" else "text, tool_result"
        raise ConfigError(at + "type", kind, f"is not supported in a message of the {role}; known are {allowed}")


def _function(i: int, tool: dict[str, Any]) -> dict[str, Any] | None:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        warn_of_tool(string(f"tools[{i}].", tool, "type"))
        return None
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise ConfigError(f"tools[{i}].input_schema", schema, "must be a JSON schema")
    function: dict[str, Any] = {"name": string(f"tools[{i}].", tool, "name"), "parameters": schema}
    if tool.get("description") is not None:
        function["description"] = string(f"tools[{i}].", tool, "description")
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> tuple[Any, bool]:
    """The chat's choice, and whether several calls may be made."""
    kinds = {"auto": "auto", "any": "required", "none": "none", "tool": "tool"}
    kind = choice.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError("tool_choice.type", kind, f"must be one of {', '.join(kinds)}")
    parallel = choice.get("disable_parallel_tool_use") is not True
    if kind == "tool":
        return {"type": "function", "function": {"name": string("tool_choice.", choice, "name")}}, parallel
    return kinds[kind], parallel


def _response_format(format: Any) -> dict[str, Any]:
    if (
        not isinstance(format, dict)
        or format.get("type") != "json_schema"
        or not isinstance(format.get("schema"), dict)
    ):
        raise ConfigError("output_config.format", format, "must be {'type': 'json_schema', 'schema': …}")
    return {"type": "json_schema", "json_schema": {"schema": format["schema"]}}

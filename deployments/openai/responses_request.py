"""The request of /v1/responses, and the chat that it means. Nothing is stored: each request brings its conversation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.openai.requests import ChatRequest
from stagemesh.deployments.openai.schema import OpenAIRequest, one_type

logger = logging.getLogger(__name__)

_SAME_IN_CHAT = (
    "model", "user", "priority", "timeout", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "chat_template_kwargs", "parallel_tool_calls",
    "stream",
)  # fmt: skip
RESPONSES_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "messages": "input",
}
"""Of ChatRequest's fields, in error messages."""
_ROLES = ("user", "assistant", "system", "developer")
# What the functions below take, for /openapi.json.
_TEXT = {"type": "string"}
_PART = {"anyOf": [one_type(kind, text=_TEXT) for kind in ("input_text", "output_text", "text")]}
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_ITEM = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"const": "message"}, "role": {"enum": list(_ROLES)}, "content": _CONTENT},
            "required": ["role"],
        },
        one_type("function_call", call_id=_TEXT, name=_TEXT, arguments=_TEXT),
        one_type("function_call_output", call_id=_TEXT, output=_CONTENT),
        one_type("reasoning"),
    ]
}
_TOOL = {
    "anyOf": [
        one_type("function", name=_TEXT),
        {"type": "object", "properties": {"type": _TEXT}, "required": ["type"]},
    ]
}
_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        one_type("function", name=_TEXT),
        one_type("allowed_tools", tools={"type": "array", "items": {"type": "object"}}),
    ]
}
_FORMAT = {"anyOf": [one_type("text"), one_type("json_object"), one_type("json_schema", schema={"type": "object"})]}
_warned: set[str] = set()


class ResponsesRequest(OpenAIRequest):
    input: str | list[Annotated[dict[str, Any], WithJsonSchema(_ITEM)]]
    """A text, or items: messages, function_call and function_call_output; reasoning is skipped."""
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Annotated[dict[str, Any], WithJsonSchema(_TOOL)]] | None = None
    """Functions; tools that OpenAI's servers run are not offered to the model."""
    tool_choice: Annotated[str | dict[str, Any], WithJsonSchema(_TOOL_CHOICE)] | None = None
    """auto, none, required, a function, or allowed_tools."""
    parallel_tool_calls: bool | None = None
    text: Annotated[dict[str, Any], WithJsonSchema({"type": "object", "properties": {"format": _FORMAT}})] | None = None
    """{"format": {"type": "text", "json_object" or "json_schema", …}}"""
    stream: bool | None = None
    store: bool | None = None
    """Nothing is stored."""
    metadata: dict[str, str] | None = None
    """Given back."""
    previous_response_id: str | None = None
    """Refused, as `conversation`, `background` and `prompt` are."""
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def _check(self) -> None:
        """Other fields of OpenAI do not change an answer here."""
        extra = self.model_extra or {}
        for name in ("previous_response_id", "conversation", "prompt"):
            if (value := getattr(self, name, None)) is not None:
                raise ConfigError(name, value, "must be null: nothing is stored here, send the conversation as input")
        for name in ("background", "top_logprobs"):
            if extra.get(name):
                raise ConfigError(name, extra[name], "is not supported")

    def chat(self) -> ChatRequest:
        """Raises ConfigError naming fields of this request."""
        fields = {name: value for name in _SAME_IN_CHAT if (value := getattr(self, name)) is not None}
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        fields["messages"] = _messages(self.instructions, self.input)
        choice, allowed = _tool_choice(self.tool_choice)
        tools = [tool for i, one in enumerate(self.tools or ()) if (tool := _function(i, one)) is not None]
        if allowed is not None:
            tools = [tool for tool in tools if tool["function"]["name"] in allowed]
        if tools or choice not in (None, "auto", "none"):
            fields |= {"tools": tools, "tool_choice": choice or "auto"}
        if (format := _response_format(self.text)) is not None:
            fields["response_format"] = format
        return ChatRequest.parse(fields)


def warn_of_tool(kind: str) -> None:
    """Once per kind: a tool that its API's own servers run is not offered to the model."""
    if kind not in _warned and len(_warned) < 100:
        _warned.add(kind)
        logger.warning("tools of type %.50r are not run here; the model is not told of them", kind)


def text_of_parts(field: str, content: Any, types: Sequence[str]) -> str:
    """`content`: a text, or parts of `types` with their text under "text", or "refusal". Raises ConfigError."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConfigError(field, content, "must be a text or a list of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in types:
            raise ConfigError(f"{field}[{i}].type", kind, f"must be one of {', '.join(types)}")
        texts.append(string(f"{field}[{i}].", part, "refusal" if kind == "refusal" else "text"))
    return "\n".join(texts)


def string(prefix: str, fields: dict[str, Any], name: str) -> str:
    """A required text. Raises ConfigError."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise ConfigError(prefix + name, value, "must be a string")
    return value


def add_call(messages: list[dict[str, Any]], id: str, name: str, arguments: str) -> None:
    """To the assistant's message that it belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1].setdefault("tool_calls", []).append(call)


def _messages(instructions: str | None, items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": [{"type": "text", "text": instructions}]})
    for i, item in enumerate([{"role": "user", "content": items}] if isinstance(items, str) else items):
        _add_item(messages, f"input[{i}].", item)
    return messages


def _add_item(messages: list[dict[str, Any]], at: str, item: dict[str, Any]) -> None:
    kind = item.get("type") or "message"
    if kind == "function_call":
        add_call(messages, string(at, item, "call_id"), string(at, item, "name"), string(at, item, "arguments"))
    elif kind == "function_call_output":
        output = text_of_parts(at + "output", item.get("output"), ("input_text", "output_text", "text"))
        messages.append({"role": "tool", "content": output, "tool_call_id": string(at, item, "call_id")})
    elif kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise ConfigError(at + "role", role, f"must be one of {', '.join(_ROLES)}")
        types = ("input_text", "output_text", "text", "refusal")
        content = text_of_parts(at + "content", item.get("content"), types)
        role = "system" if role == "developer" else role  # templates know that name
        if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
            messages[0]["content"].append({"type": "text", "text": content})  # and many allow only one, at the start
        else:
            messages.append({"role": role, "content": [{"type": "text", "text": content}]})
    elif kind != "reasoning":
        allowed = "message, function_call, function_call_output, reasoning"
        raise ConfigError(at + "type", kind, f"is not supported; known are {allowed}")


def _function(i: int, tool: dict[str, Any]) -> dict[str, Any] | None:
    kind = string(f"tools[{i}].", tool, "type")
    if kind != "function":
        warn_of_tool(kind)
        return None
    function = {name: tool[name] for name in ("description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {"name": string(f"tools[{i}].", tool, "name"), **function}}


def _tool_choice(choice: str | dict[str, Any] | None) -> tuple[Any, set[str] | None]:
    """The chat's choice, and the names that alone may be called."""
    if not isinstance(choice, dict):
        if choice not in (None, "auto", "none", "required"):
            raise ConfigError("tool_choice", choice, "must be auto, none, required, a function or allowed_tools")
        return choice, None
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": string("tool_choice.", choice, "name")}}, None
    if kind != "allowed_tools":
        raise ConfigError("tool_choice.type", kind, "must be function or allowed_tools")
    mode, tools = choice.get("mode", "auto"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise ConfigError("tool_choice.mode", mode, "must be auto or required")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError("tool_choice.tools", tools, "must be a list of tools")
    return mode, {name for tool in tools if isinstance(name := tool.get("name"), str)}


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    format = (text or {}).get("format")
    if format is None:
        return None
    kind = format.get("type") if isinstance(format, dict) else None
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind != "json_schema":
        raise ConfigError("text.format", format, "its type must be text, json_object or json_schema")
    schema = format.get("schema")
    if not isinstance(schema, dict):
        raise ConfigError("text.format.schema", schema, "must be a JSON schema")
    return {"type": "json_schema", "json_schema": {"schema": schema}}

"""What a request's tools mean for its prompt, for the form of its answer and for who finds calls in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.tool_calls import (
    NO_PARAMETERS,
    NamedParser,
    OfferedTools,
    ToolParser,
    forced_calls_schema,
)
from stagemesh.stages.text.tool_formats import FreeCalls, Hermes, ListedCalls, format_of

MakeToolParser = Callable[[], ToolParser]
Messages = Sequence[Mapping[str, Any]]

_DESCRIPTION = "You can call these functions, one JSON object per line with the schema of its parameters:\n"
_FORM = (
    "\n\nTo call a function, write its name and arguments as a JSON object between tags, once for each call:\n"
    '<tool_call>\n{"name": "the function", "arguments": {"a parameter": "its value"}}\n</tool_call>'
)


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Of one request."""

    tools: Sequence[Mapping[str, Any]] = ()
    """For the template."""
    description: str = ""
    """For a template that knows no tools."""
    schema: dict[str, Any] | None = None
    """Of an answer that must be calls."""
    make_parser: MakeToolParser | None = None
    special_tokens: tuple[str, ...] = ()
    """That the parser must see in the text."""

    def plain_messages(self, messages: Messages, *, as_user: bool = False) -> list[Mapping[str, Any]]:
        """`messages` with tools, calls and their results in words, for a template that knows none.

        as_user: the description belongs to the first message of the user, for templates without a system's role.
        """
        plain: list[dict[str, Any]] = []
        for message in messages:
            role, text = message.get("role"), message["content"]
            if role == "tool":
                text = f"<tool_response>\n{text}\n</tool_response>"
                if plain and plain[-1]["role"] == "user":
                    plain[-1]["content"] += "\n" + text
                else:
                    plain.append({"role": "user", "content": text})
                continue
            calls = message.get("tool_calls") or ()
            texts = [text, *map(_call_in_words, calls)] if role == "assistant" else [text]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**kept, "content": "\n".join(filter(None, texts))})
        holder = next((m for m in plain if m["role"] == ("user" if as_user else "system")), None)
        if holder is None:
            return [{"role": "user" if as_user else "system", "content": self.description}, *plain]
        texts = [self.description, holder["content"]] if as_user else [holder["content"], self.description]
        holder["content"] = "\n\n".join(filter(None, texts))
        return list(plain)


def tool_use(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None,
    *,
    parallel: bool,
    template: str,
    format: type[FreeCalls] | None = None,
) -> ToolUse:
    """choice: as in ChatInput. template: its source. format: of free calls; None = the template's."""
    tools, choice = _allowed(tools, choice)
    functions = [tool["function"] for tool in tools]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise ConfigError("tools", names, "must not hold two functions of the same name")
    name = choice["function"]["name"] if isinstance(choice, Mapping) else None
    if not functions and choice not in (None, "none", "auto"):
        raise ConfigError("tool_choice", name or choice, "needs tools")
    if name is not None and name not in names:
        raise ConfigError("tool_choice", name, "is not one of the tools")
    if not functions or choice == "none":
        return ToolUse()
    if choice is None:
        return ToolUse(tools=tools)
    knows_tools = re.search(r"\btools\b", template) is not None
    if choice == "auto":
        format = format or format_of(template)
        make: MakeToolParser = partial(format or Hermes, OfferedTools(functions), max_calls=None if parallel else 1)
        if format is None or (format is Hermes and not knows_tools):
            return ToolUse(description=_described(functions) + _FORM, make_parser=make)
        return ToolUse(tools=tools, make_parser=make, special_tokens=format.special_tokens)
    if name is not None:
        schema = functions[names.index(name)].get("parameters") or NO_PARAMETERS
        make = partial(NamedParser, name)
    else:
        schema = forced_calls_schema(functions, parallel=parallel)
        make = partial(ListedCalls, None)
    if knows_tools:
        return ToolUse(tools=tools, schema=schema, make_parser=make)
    return ToolUse(description=_described(functions), schema=schema, make_parser=make)


def _allowed(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None
) -> tuple[Sequence[Mapping[str, Any]], str | Mapping[str, Any] | None]:
    """Without OpenAI's `allowed_tools`: the tools that it names, and its mode."""
    if not isinstance(choice, Mapping) or choice.get("type") != "allowed_tools":
        return tools, choice
    allowed = choice.get("allowed_tools", choice)
    mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
    entries = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(entries, Sequence) or not entries:
        reason = 'needs "mode": "auto" or "required", and "tools": at least one of the tools'
        raise ConfigError("tool_choice.allowed_tools", allowed, reason)
    names = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        names.append(function.get("name") if isinstance(function, Mapping) else entry)
        if names[-1] not in [tool["function"]["name"] for tool in tools]:
            raise ConfigError("tool_choice.allowed_tools", names[-1], "is not one of the tools")
    return [tool for tool in tools if tool["function"]["name"] in names], mode


def _described(functions: Sequence[Mapping[str, Any]]) -> str:
    try:
        return _DESCRIPTION + "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    except RecursionError as error:
        raise ConfigError("tools", "their parameters", "are nested too deeply") from error


def _call_in_words(call: Any) -> str:
    """ConfigError: no call of a function."""
    try:
        function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"
    except (KeyError, TypeError, RecursionError) as error:
        raise ConfigError("messages", call, "a tool call needs function.name and function.arguments") from error

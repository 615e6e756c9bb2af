"""Prompts as vLLM's offline classes take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from stagemesh.config.errors import ConfigError


class TextPrompt(TypedDict):
    prompt: str


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    """Their text, for the result."""


PromptType = str | Sequence[int] | TextPrompt | TokensPrompt | Mapping[str, Any]
Prompts = PromptType | Sequence[PromptType]


def as_list(prompts: Any) -> list[Any]:
    """A list of numbers is one prompt, as token ids."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def text_and_prompt(i: int, prompt: PromptType) -> tuple[str | None, str | list[int]]:
    """Its text, if known, and what the model gets: text to be tokenized, or token ids."""
    if isinstance(prompt, str):
        return prompt, prompt
    if not isinstance(prompt, Mapping):
        return None, list(prompt)
    fields: Mapping[str, Any] = prompt
    text = fields.get("prompt")
    if (token_ids := fields.get("prompt_token_ids")) is not None:
        return text, list(token_ids)
    if text is None:
        raise ConfigError(f"prompts[{i}]", dict(fields), "must hold 'prompt' or 'prompt_token_ids'")
    return text, text

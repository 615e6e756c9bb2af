"""`stagemesh chat` and `stagemesh complete`: a running server, in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from stagemesh.deployments.cli.client import Client, ServerError

Url = Annotated[str, typer.Option(help="The server, with or without /v1.")]
Model = Annotated[str | None, typer.Option("--model", "--model-name", help="By default the first that is served.")]
ApiKey = Annotated[str | None, typer.Option(help="By default OPENAI_API_KEY.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)]
Temperature = Annotated[float | None, typer.Option(help="By default the model's.", min=0)]
DEFAULT_URL = "http://localhost:8000"


def chat(
    url: Url = DEFAULT_URL,
    model: Model = None,
    api_key: ApiKey = None,
    system_prompt: Annotated[str | None, typer.Option(help="First message of the conversation.")] = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", help="Ask this, show the answer and stop.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
) -> None:
    """Talk with a served model. Ctrl-C ends an answer, Ctrl-D the conversation."""
    client = Client(url, api_key)
    settings = _settings(client.model(model), max_tokens=max_tokens, temperature=temperature)
    messages: list[dict[str, str]] = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def answer(text: str) -> None:
        asked = [*messages, {"role": "user", "content": text}]
        said = _show(client.stream("/v1/chat/completions", {**settings, "messages": asked}), _chat_text)
        messages[:] = [*asked, {"role": "assistant", "content": said}]

    _converse(answer, quick, settings["model"])


def complete(
    url: Url = DEFAULT_URL,
    model: Model = None,
    api_key: ApiKey = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", help="Continue this, show the text and stop.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
) -> None:
    """Let a served model continue texts. Ctrl-C ends an answer, Ctrl-D the command."""
    client = Client(url, api_key)
    settings = _settings(client.model(model), max_tokens=max_tokens, temperature=temperature)

    def answer(text: str) -> None:
        _show(client.stream("/v1/completions", {**settings, "prompt": text}), lambda choice: choice.get("text"))

    _converse(answer, quick, settings["model"])


def _settings(model: str, **given: Any) -> dict[str, Any]:
    return {"model": model} | {name: value for name, value in given.items() if value is not None}


def _converse(answer: Callable[[str], None], quick: str | None, model: str) -> None:
    """Raises ServerError for `quick` alone: in a conversation the next line may go better."""
    if quick is not None:
        answer(quick)
        return
    print(f"{model}: Ctrl-C ends an answer, Ctrl-D this command.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text:
            continue
        try:
            answer(text)
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)


def _chat_text(choice: dict[str, Any]) -> str:
    """Of an event: reasoning, answer, and tool calls as they are streamed."""
    delta = choice.get("delta") or {}
    functions = [call.get("function") or {} for call in delta.get("tool_calls") or ()]
    calls = [(function.get("name") or "") + (function.get("arguments") or "") for function in functions]
    return (delta.get("reasoning") or "") + (delta.get("content") or "") + "".join(calls)


def _show(events: Iterator[dict[str, Any]], text_of: Callable[[dict[str, Any]], str | None]) -> str:
    """Print the text as it comes; returns it. Ctrl-C ends the answer."""
    said = ""
    with closing(events):  # type: ignore[type-var]  # generators close
        try:
            for event in events:
                for choice in event.get("choices", ()):
                    piece = text_of(choice) or ""
                    said += piece
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
    print()
    return said

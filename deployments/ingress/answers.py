"""A GenerationStream that has ended as one response body, with all that its request asks for."""

from __future__ import annotations

import msgspec

from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.conversation import NamedTool
from stagemesh.deployments.openai.logprobs import (
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    joined,
    prompt_logprobs,
)
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.deployments.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatResponse,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    FunctionCall,
    PromptLogprobs,
    ToolCall,
)
from stagemesh.stages.text.output import DecodedLogprob, OutputProcessor


def completion_response(stream: GenerationStream, body: CompletionRequest) -> CompletionResponse:
    echo = Echo(stream, body)
    choices = [
        CompletionChoice(
            choice.index,
            echo.text(choice) + ("" if body.echoes_alone else choice.text) if body.echo else choice.text,
            choice.finish_reason,
            choice.seed,
            choice.stop_reason,
            echo.logprobs(choice, choice.logprobs, is_first=True) if body.logprobs is not None else None,
            _prompt_logprobs(choice),
            choice.token_ids if body.return_token_ids else None,
            choice.request.prompt_token_ids if body.return_token_ids else None,
        )
        for choice in stream.choices
    ]
    return CompletionResponse(stream.id, stream.created, stream.model, choices, stream.usage, stream.system_fingerprint)


def chat_response(stream: GenerationStream, body: ChatRequest) -> ChatResponse:
    as_ids = body.return_tokens_as_token_ids is True
    choices = [
        ChatChoice(
            choice.index,
            _assistant_message(choice, body),
            choice.finish_reason,
            choice.seed,
            choice.stop_reason,
            chat_logprobs(choice.logprobs, as_ids=as_ids) if body.logprobs else None,
            choice.token_ids if body.return_token_ids else None,
        )
        for choice in stream.choices
    ]
    return ChatResponse(
        stream.id,
        stream.created,
        stream.model,
        choices,
        stream.usage,
        stream.system_fingerprint,
        prompt_logprobs=_prompt_logprobs(stream.choices[0]),
        prompt_token_ids=stream.choices[0].request.prompt_token_ids if body.return_token_ids else None,
    )


class Echo:
    """The prompts of a completion as parts of its answers, where `echo` asks for that."""

    def __init__(self, stream: GenerationStream, body: CompletionRequest) -> None:
        self._stream = stream
        self._body = body
        self._as_ids = body.return_tokens_as_token_ids is True

    def text(self, choice: OutputProcessor) -> str:
        text = self._stream.prompt_of(choice).text
        if text is None:
            text = self._stream.tokenizer.decode(choice.request.prompt_token_ids, skip_special_tokens=False)
        return text

    def logprobs(
        self, choice: OutputProcessor, logprobs: list[DecodedLogprob], *, is_first: bool
    ) -> CompletionLogprobs:
        """Of an answer's next tokens, behind those of its prompt if they are its first ones."""
        if not self._body.echo:
            return completion_logprobs(logprobs, as_ids=self._as_ids)
        text = self.text(choice)
        shown = [] if self._body.echoes_alone else logprobs
        own = completion_logprobs(shown, as_ids=self._as_ids, first_offset=len(text))
        if not is_first:
            return own
        token_ids, before = choice.request.prompt_token_ids, choice.prompt_logprobs or []
        return joined(echoed_logprobs(token_ids, before, text, self._stream.tokenizer, as_ids=self._as_ids), own)


def _assistant_message(choice: OutputProcessor, body: ChatRequest) -> AssistantMessage:
    calls = [
        ToolCall(call.id, FunctionCall(call.name, call.arguments))
        for call in choice.tool_calls
        if choice.finish_reason != "length" or _is_json(call.arguments)  # cut off, it cannot be called
    ]
    is_called_for = isinstance(body.tool_choice, NamedTool)  # vLLM's content is empty then, and no null
    has_other = bool(calls or choice.reasoning) and not is_called_for
    return AssistantMessage(
        body.echoed_message + choice.text or (None if has_other else ""),
        reasoning=choice.reasoning or None,
        reasoning_content=choice.reasoning or None,
        tool_calls=calls or msgspec.UNSET,
    )


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return True


def _prompt_logprobs(choice: OutputProcessor) -> PromptLogprobs | None:
    return None if choice.prompt_logprobs is None else prompt_logprobs(choice.prompt_logprobs)

"""Server-sent events of OpenAI's streaming responses, for speed joined from parts encoded once per request."""

from __future__ import annotations

from typing import Any

import msgspec

from stagemesh.deployments.ingress.answers import Echo
from stagemesh.deployments.ingress.errors import ErrorReport
from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.logprobs import chat_logprobs
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest, InferenceRequest, StreamOptions
from stagemesh.deployments.openai.responses import PromptTokensDetails, Usage
from stagemesh.stages.text.output import TextDelta
from stagemesh.stages.text.tool_calls import ToolCallDelta

_json = msgspec.json.encode

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
"""A comment, which clients skip: shows them and all proxies that the connection lives."""
_FINISH = {reason: b',"finish_reason":' + _json(reason) for reason in (None, "stop", "length", "tool_calls")}
_NO_LOGPROBS = b',"logprobs":null'
_RUNNING = _FINISH[None] + b',"stop_reason":null'


def event(content: Any) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


class ChunkWriter:
    """Chunks of one streaming response. Subclasses write a choice's content.

    Every delta is a chunk, also one whose text is held back: clients tell the time of each token by it.
    """

    object: str

    def __init__(self, stream: GenerationStream, body: InferenceRequest) -> None:
        head = _json(
            {
                "id": stream.id,
                "object": self.object,
                "created": stream.created,
                "model": stream.model,
                "system_fingerprint": stream.system_fingerprint,
            }
        )
        self._head = b"data: " + head[:-1] + b',"choices":['
        options = body.stream_options or StreamOptions()
        self._include_usage = options.include_usage is True
        self._continuous_usage = self._include_usage and options.continuous_usage_stats is True
        self._stream = stream
        self._return_token_ids = body.return_token_ids is True
        self._as_ids = body.return_tokens_as_token_ids is True
        self._num_tokens = [0] * len(stream.choices)
        self._is_opened = [False] * len(stream.choices)

    def delta(self, delta: TextDelta) -> bytes:
        """The event for new tokens of one choice, after its opening event, if any."""
        index = delta.index
        is_first = not self._is_opened[index]
        opening = b""
        if is_first:
            self._is_opened[index] = True
            opening = self._opening(index)
        self._num_tokens[index] += len(delta.token_ids)
        choice = b'{"index":%d,%s%s%s%s}' % (
            index,
            self._content(delta, is_first),
            self._logprobs(delta, is_first),
            self._ids(delta, is_first),
            self._finish(delta),
        )
        return opening + self._head + choice + self._tail(index)

    def end(self) -> bytes:
        """Usage if requested, and the end mark."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + _json(self._stream.usage) + b"}\n\n" + DONE

    def _tail(self, index: int, more: bytes = b"") -> bytes:
        """more: fields of the chunk."""
        if self._continuous_usage:
            return b"]" + more + b',"usage":' + _json(self._usage_so_far(index)) + b"}\n\n"
        return b"]" + more + (b',"usage":null}\n\n' if self._include_usage else b"}\n\n")

    def _usage_so_far(self, index: int) -> Usage:
        choice = self._stream.choices[index]
        num_prompt, num_tokens = len(choice.request.prompt_token_ids), self._num_tokens[index]
        details = PromptTokensDetails(choice.num_cached_tokens)
        return Usage(num_prompt, num_tokens, num_prompt + num_tokens, details)

    def _finish(self, delta: TextDelta) -> bytes:
        if delta.finish_reason is None:
            return _RUNNING
        choice = self._stream.choices[delta.index]
        reasons = _FINISH[delta.finish_reason], _json(choice.stop_reason), choice.seed
        return b'%s,"stop_reason":%s,"seed":%d' % reasons

    def _ids(self, delta: TextDelta, is_first: bool) -> bytes:
        return b',"token_ids":' + (_json(delta.token_ids) if self._return_token_ids else b"null")

    def error(self, report: ErrorReport) -> bytes:
        return event(report.body()) + DONE

    def _opening(self, index: int) -> bytes:
        return b""

    def _content(self, delta: TextDelta, is_first: bool) -> bytes:
        raise NotImplementedError

    def _logprobs(self, delta: TextDelta, is_first: bool) -> bytes:
        raise NotImplementedError


class CompletionChunks(ChunkWriter):
    object = "text_completion"

    def __init__(self, stream: GenerationStream, body: CompletionRequest) -> None:
        super().__init__(stream, body)
        self._body = body
        self._echo = Echo(stream, body)

    def _content(self, delta: TextDelta, is_first: bool) -> bytes:
        text = "" if self._body.echoes_alone else delta.text
        if is_first and self._body.echo:
            text = self._echo.text(self._stream.choices[delta.index]) + text
        return b'"text":' + _json(text)

    def _logprobs(self, delta: TextDelta, is_first: bool) -> bytes:
        if self._body.logprobs is None or not (delta.logprobs or is_first):
            return _NO_LOGPROBS
        choice = self._stream.choices[delta.index]
        return b',"logprobs":' + _json(self._echo.logprobs(choice, delta.logprobs, is_first=is_first))

    def _ids(self, delta: TextDelta, is_first: bool) -> bytes:
        is_shown = is_first and self._return_token_ids
        prompt = _json(self._stream.choices[delta.index].request.prompt_token_ids) if is_shown else b"null"
        return super()._ids(delta, is_first) + b',"prompt_token_ids":' + prompt


class ChatChunks(ChunkWriter):
    object = "chat.completion.chunk"

    def __init__(self, stream: GenerationStream, body: ChatRequest) -> None:
        super().__init__(stream, body)
        self._echoed = body.echoed_message

    def _opening(self, index: int) -> bytes:
        opening = b'{"index":%d,"delta":{"role":"assistant","content":%s}%s,"token_ids":%s%s}'
        ids, more = b"null", b""
        if self._return_token_ids:
            ids = b"[]"
            more = b',"prompt_token_ids":' + _json(self._stream.choices[index].request.prompt_token_ids)
        event = self._head + opening % (index, b'""', _NO_LOGPROBS, ids, _RUNNING) + self._tail(index, more)
        if self._echoed:
            echoed = _json(self._echoed)
            event += self._head + opening % (index, echoed, _NO_LOGPROBS, ids, _RUNNING) + self._tail(index)
        return event

    def _content(self, delta: TextDelta, is_first: bool) -> bytes:
        parts = []
        if delta.reasoning:
            reasoning = _json(delta.reasoning)
            parts.append(b'"reasoning":%s,"reasoning_content":%s' % (reasoning, reasoning))
        if delta.text or not (delta.tool_calls or delta.reasoning):
            parts.append(b'"content":' + _json(delta.text))
        if delta.tool_calls:
            parts.append(b'"tool_calls":' + _json([_tool_call(call) for call in delta.tool_calls]))
        return b'"delta":{' + b",".join(parts) + b"}"

    def _logprobs(self, delta: TextDelta, is_first: bool) -> bytes:
        if not delta.logprobs:
            return _NO_LOGPROBS
        return b',"logprobs":' + _json(chat_logprobs(delta.logprobs, as_ids=self._as_ids))


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}

"""Server-sent events of OpenAI's streaming responses, for speed joined from parts encoded once per request."""

from __future__ import annotations

from typing import Any

import msgspec

from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.logprobs import chat_logprobs, completion_logprobs
from stagemesh.stages.text.output import DecodedLogprob, TextDelta
from stagemesh.stages.text.tool_calls import ToolCallDelta

_json = msgspec.json.encode

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
"""A comment, which clients skip: shows them and all proxies that the connection lives."""
_FINISH = {reason: b',"finish_reason":' + _json(reason) for reason in (None, "stop", "length", "tool_calls")}
_NO_LOGPROBS = b',"logprobs":null'


def event(content: Any) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


class ChunkWriter:
    """Chunks of one streaming response. Subclasses write a choice's content."""

    object: str

    def __init__(
        self, stream: GenerationStream, *, include_usage: bool = False, return_token_ids: bool = False
    ) -> None:
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
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._stream = stream
        self._include_usage = include_usage
        self._return_token_ids = return_token_ids
        self._is_opened = [False] * len(stream.choices)

    def delta(self, delta: TextDelta) -> bytes:
        """The event for new tokens of one choice, after its opening event, if any."""
        opening = b""
        if not self._is_opened[delta.index]:
            self._is_opened[delta.index] = True
            opening = self._opening(delta.index)
        logprobs = b',"logprobs":' + self._logprobs(delta.logprobs) if delta.logprobs else _NO_LOGPROBS
        token_ids = b',"token_ids":' + _json(delta.token_ids) if self._return_token_ids else b""
        seed = b',"seed":%d' % self._stream.choices[delta.index].seed if delta.finish_reason is not None else b""
        choice = b'{"index":%d,%s%s%s%s%s}' % (
            delta.index,
            self._content(delta),
            logprobs,
            token_ids,
            _FINISH[delta.finish_reason],
            seed,
        )
        return opening + self._head + choice + self._tail

    def end(self) -> bytes:
        """Usage if requested, and the end mark."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + _json(self._stream.usage) + b"}\n\n" + DONE

    def _opening(self, index: int) -> bytes:
        return b""

    def _content(self, delta: TextDelta) -> bytes:
        raise NotImplementedError

    def _logprobs(self, logprobs: list[DecodedLogprob]) -> bytes:
        raise NotImplementedError


class CompletionChunks(ChunkWriter):
    object = "text_completion"

    def _content(self, delta: TextDelta) -> bytes:
        return b'"text":' + _json(delta.text)

    def _logprobs(self, logprobs: list[DecodedLogprob]) -> bytes:
        return _json(completion_logprobs(logprobs))


class ChatChunks(ChunkWriter):
    object = "chat.completion.chunk"

    def _opening(self, index: int) -> bytes:
        opening = b'{"index":%d,"delta":{"role":"assistant","content":""}%s%s}'
        return self._head + opening % (index, _NO_LOGPROBS, _FINISH[None]) + self._tail

    def _content(self, delta: TextDelta) -> bytes:
        parts = []
        if delta.reasoning:
            reasoning = _json(delta.reasoning)
            parts.append(b'"reasoning":%s,"reasoning_content":%s' % (reasoning, reasoning))
        if delta.text or not (delta.tool_calls or delta.finish_reason or delta.reasoning):
            parts.append(b'"content":' + _json(delta.text))
        if delta.tool_calls:
            parts.append(b'"tool_calls":' + _json([_tool_call(call) for call in delta.tool_calls]))
        return b'"delta":{' + b",".join(parts) + b"}"

    def _logprobs(self, logprobs: list[DecodedLogprob]) -> bytes:
        return _json(chat_logprobs(logprobs))


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}

"""Server-sent events of OpenAI's streaming answers, joined from parts that are encoded once per request.

A chunk is written per token and stream, so it is bytes around one JSON string, not a model dumped anew.
"""

from __future__ import annotations

from typing import Any

import msgspec

from stagemesh.deployments.ingress.choice import Piece
from stagemesh.deployments.ingress.service import Generation
from stagemesh.deployments.openai.logprobs import DecodedLogprob, chat_logprobs, completion_logprobs
from stagemesh.stages.text.tool_calls import ToolCallDelta

_json = msgspec.json.encode

DONE = b"data: [DONE]\n\n"
_FINISH = {reason: b',"finish_reason":' + _json(reason) + b"}" for reason in (None, "stop", "length", "tool_calls")}
_NO_LOGPROBS = b',"logprobs":null'


def event(content: Any) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


class ChunkWriter:
    """Chunks of one streaming answer. Subclasses say how a choice's text looks."""

    object: str

    def __init__(self, generation: Generation, *, include_usage: bool) -> None:
        head = _json(
            {
                "id": generation.id,
                "object": self.object,
                "created": generation.created,
                "model": generation.model,
            }
        )
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._generation = generation
        self._include_usage = include_usage

    def piece(self, piece: Piece) -> bytes:
        """The event for new text of one choice."""
        logprobs = b',"logprobs":' + self._logprobs(piece.logprobs) if piece.logprobs else _NO_LOGPROBS
        choice = b'{"index":%d,%s%s%s' % (piece.index, self._content(piece), logprobs, _FINISH[piece.finish_reason])
        return self._head + choice + self._tail

    def end(self) -> bytes:
        """What follows the last piece: usage if it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + _json(self._generation.usage) + b"}\n\n" + DONE

    def _content(self, piece: Piece) -> bytes:
        raise NotImplementedError

    def _logprobs(self, reports: list[DecodedLogprob]) -> bytes:
        raise NotImplementedError


class CompletionChunks(ChunkWriter):
    object = "text_completion"

    def _content(self, piece: Piece) -> bytes:
        return b'"text":' + _json(piece.text)

    def _logprobs(self, reports: list[DecodedLogprob]) -> bytes:
        return _json(completion_logprobs(reports))


class ChatChunks(ChunkWriter):
    object = "chat.completion.chunk"

    def __init__(self, generation: Generation, *, include_usage: bool) -> None:
        super().__init__(generation, include_usage=include_usage)
        self._opened = [False] * len(generation.choices)

    def piece(self, piece: Piece) -> bytes:
        """The event; before the first of a choice comes the one that opens the assistant's turn."""
        if self._opened[piece.index]:
            return super().piece(piece)
        self._opened[piece.index] = True
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""}%s%s'
        opening = delta % (piece.index, _NO_LOGPROBS, _FINISH[None])
        return self._head + opening + self._tail + super().piece(piece)

    def _content(self, piece: Piece) -> bytes:
        parts = []
        if piece.text:
            parts.append(b'"content":' + _json(piece.text))
        if piece.tool_calls:
            parts.append(b'"tool_calls":' + _json([_tool_call(delta) for delta in piece.tool_calls]))
        return b'"delta":{' + b",".join(parts) + b"}"

    def _logprobs(self, reports: list[DecodedLogprob]) -> bytes:
        return _json(chat_logprobs(reports))


def _tool_call(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}

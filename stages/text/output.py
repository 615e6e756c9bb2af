"""Tokens out: TokenDeltas become text, log-probabilities and tool calls, for streams, whole responses and `LLM`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from stagemesh.config.errors import ConfigError
from stagemesh.stages.messages.request import EngineRequest, LaneError, TokenDelta
from stagemesh.stages.messages.step import LEAST_LOGPROB, TokenLogprobs
from stagemesh.stages.text.detokenizer import StopStrings
from stagemesh.stages.text.input import ProcessedPrompt
from stagemesh.stages.text.reasoning import ReasoningParser, SplitText
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_calls import NamedParser, ToolCall, ToolCallDelta, ToolParser


class DecodedLogprob(msgspec.Struct, frozen=True):
    """The log-probability of a token, with its text."""

    token_id: int
    token: str
    """U+FFFD where it is only part of a character."""
    bytes: bytes
    logprob: float
    """At least LEAST_LOGPROB."""
    rank: int
    """1 for the likeliest token."""
    top: list[DecodedLogprob] = []
    """The likeliest tokens, falling."""
    offset: int = 0
    """Characters of the answer before it."""


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """What became certain of choice `index` with more tokens."""

    index: int
    text: str
    """Safe to show: no part of a character, stop string or tool call."""
    token_ids: list[int]
    """The new tokens, whose text may be held back."""
    logprobs: list[DecodedLogprob] = []
    """Per new token, if requested."""
    tool_calls: list[ToolCallDelta] = []
    reasoning: str = ""
    """More of what the model thinks before it answers."""
    finish_reason: str | None = None
    """ "stop", "length" or "tool_calls" on the last delta."""


class OutputProcessor:
    """One answer: turns TokenDeltas into TextDeltas, holds the whole so far."""

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        tokenizer: Tokenizer,
        tool_parser: ToolParser | None = None,
        *,
        reasoning_parser: ReasoningParser | None = None,
        shown_special_tokens: Collection[str] = (),
    ) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.token_ids: list[int] = []
        """Up to and including the token that ended it or completed a stop string."""
        self.logprobs: list[DecodedLogprob] = []
        """Per token id, if requested."""
        self.prompt_logprobs: list[DecodedLogprob] | None = None
        """Per prompt token after the first, if requested."""
        self.tool_calls: list[ToolCall] = []
        self.num_reasoning_tokens = 0
        """Up to and including the end of the reasoning."""
        self.num_cached_tokens = 0
        """Of the prompt, from the prefix cache."""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        """The stop string or one of stop_token_ids; None for EOS and "length"."""
        self._tokenizer = tokenizer
        self._tool_parser = tool_parser
        self._reasoning_parser = reasoning_parser
        self._reasoning: list[str] = []
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=params.skip_special_tokens, shown=shown_special_tokens
        )
        self._stops = StopStrings(params.stop, keep=params.include_stop_str_in_output) if params.stop else None
        self._texts: list[str] = []
        self._num_logprob_chars = 0

    @property
    def seed(self) -> int:
        """With it, the same prompt and parameters give this answer again, as the first choice."""
        seed = self.request.params.seed
        assert seed is not None, "InputProcessor gives one"
        return seed

    @property
    def text(self) -> str:
        """Without reasoning and tool calls."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def process(self, delta: TokenDelta) -> TextDelta:
        """LaneError: the tokens do not follow the last ones, or the lane gave up. ConfigError: no answer can be."""
        self._check(delta)
        if not self.token_ids:
            self.num_cached_tokens = delta.num_cached_tokens
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs = self._decode(delta.prompt_logprobs)
                self._num_logprob_chars = 0  # offsets count the answer's characters
        num_before = len(self.token_ids)
        num_thoughts = len(self._reasoning)
        text = self._take_tokens(delta)
        token_ids = self.token_ids[num_before:]
        logprobs = self._decode((delta.logprobs or [])[: len(token_ids)])
        self.logprobs += logprobs
        if self._stops is not None and self._stops.hit is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.hit
        elif delta.finish_reason is not None:
            text += self._held_back()
            self.finish_reason = delta.finish_reason
            if delta.stop_token_id in self.request.params.stop_token_ids:
                self.stop_reason = delta.stop_token_id
        if self._reasoning_parser is not None and self.finish_reason is not None:
            text += self._without_reasoning(self._reasoning_parser.finish())
        tool_calls: list[ToolCallDelta] = []
        if self._tool_parser is not None:
            text, tool_calls = self._parse_tool_calls(self._tool_parser, text)
        self._texts.append(text)
        reasoning = "".join(self._reasoning[num_thoughts:])
        return TextDelta(self.index, text, token_ids, logprobs, tool_calls, reasoning, self.finish_reason)

    def _check(self, delta: TokenDelta) -> None:
        if delta.offset != len(self.token_ids):
            reason = f"tokens came from {delta.offset} on, {len(self.token_ids)} was next"
            raise LaneError("internal", f"request {self.request.request_id}: {reason}")
        if delta.finish_reason == "error":
            raise LaneError("internal", delta.error or "the lane failed")
        if delta.finish_reason == "unsatisfiable":
            raise ConfigError("", None, delta.error)
        if delta.finish_reason == "abort":
            raise LaneError("lost", delta.error or "the lane gave the request up")

    def _take_tokens(self, delta: TokenDelta) -> str:
        """Text that became certain, up to a stop string."""
        params = self.request.params
        # The token that ended the answer is counted, and its text is not part of it unless that was asked for.
        is_shown = delta.stop_token_id is None or params.include_stop_str_in_output
        shown = delta.token_ids if is_shown else delta.token_ids[:-1]
        if self._stops is None and self._reasoning_parser is None:
            self.token_ids += delta.token_ids
            return self._detokenizer.feed(shown)
        text = ""
        for token_id in shown:
            self.token_ids.append(token_id)
            new = self._detokenizer.feed((token_id,))
            if self._stops is not None and len(self.token_ids) > params.min_tokens:
                new = self._stops.feed(new)
            text += self._content(new, num_tokens=1)
            if self._stops is not None and self._stops.hit is not None:
                return text
        self.token_ids += delta.token_ids[len(shown) :]
        return text

    def _held_back(self) -> str:
        text = self._detokenizer.finish()
        return self._content(text if self._stops is None else self._stops.feed(text) + self._stops.finish())

    def _content(self, text: str, *, num_tokens: int = 0) -> str:
        """What of it is no reasoning."""
        parser = self._reasoning_parser
        if parser is None:
            return text
        if not parser.is_over:
            self.num_reasoning_tokens += num_tokens
        content = self._without_reasoning(parser.feed(text))
        if not parser.has_reasoning and parser.is_over:
            self.num_reasoning_tokens = 0
        return content

    def _without_reasoning(self, split: SplitText) -> str:
        if split.reasoning:
            self._reasoning.append(split.reasoning)
        return split.content

    def _parse_tool_calls(self, parser: ToolParser, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Content and calls of `text`; sets the finish reason "tool_calls" where there were calls."""
        content, deltas = parser.feed(text)
        if self.finish_reason is not None:
            last = parser.finish()
            content, deltas = content + last.content, deltas + last.calls
        for delta in deltas:
            if delta.name is not None and delta.id is not None:
                self.tool_calls.append(ToolCall(delta.id, delta.name, delta.arguments))
            else:
                call = self.tool_calls[-1]
                self.tool_calls[-1] = ToolCall(call.id, call.name, call.arguments + delta.arguments)
        # A caller who names the function knows what comes: OpenAI says "stop" there.
        if self.finish_reason == "stop" and self.tool_calls and not isinstance(parser, NamedParser):
            self.finish_reason = "tool_calls"
        return content, deltas

    def _decode(self, entries: Sequence[TokenLogprobs]) -> list[DecodedLogprob]:
        decoded = []
        for entry in entries:
            tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
            top = [self._logprob(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(tops, 1)]
            decoded.append(self._logprob(entry.token_id, entry.logprob, entry.rank, top))
            self._num_logprob_chars += len(decoded[-1].token)
        return decoded

    def _logprob(self, token_id: int, logprob: float, rank: int, top: Sequence[DecodedLogprob] = ()) -> DecodedLogprob:
        data = self._tokenizer.token_bytes(token_id)
        text = data.decode("utf-8", "replace")
        logprob = max(logprob, LEAST_LOGPROB)
        return DecodedLogprob(token_id, text, data, logprob, rank, list(top), self._num_logprob_chars)


def output_processors(prompts: Iterable[ProcessedPrompt], tokenizer: Tokenizer) -> list[OutputProcessor]:
    """One per choice: all of the first prompt, then those of the next."""
    return [
        OutputProcessor(
            index,
            request,
            tokenizer,
            prompt.make_tool_parser and prompt.make_tool_parser(),
            reasoning_parser=prompt.make_reasoning_parser and prompt.make_reasoning_parser(),
            shown_special_tokens=prompt.shown_special_tokens,
        )
        for index, (prompt, request) in enumerate((p, request) for p in prompts for request in p.requests)
    ]


def embedding_of(delta: TokenDelta) -> bytes:
    """The vector that a lane sent, little-endian float32. LaneError: there is none."""
    if not delta.embedding:
        raise LaneError("internal", delta.error or f"request {delta.request_id}: the lane gave no vector")
    return delta.embedding

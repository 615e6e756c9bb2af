"""One answer on its way: from a lane's tokens to pieces of text, log-probabilities and tool calls."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.ingress.lanes import LaneClient, LaneError
from stagemesh.deployments.ingress.metrics import Metrics
from stagemesh.deployments.openai.logprobs import DecodedLogprob, LogprobDecoder
from stagemesh.deployments.openai.responses import FunctionCall, ToolCall
from stagemesh.stages.messages.request import TokenDelta
from stagemesh.stages.messages.step import TokenLogprobs
from stagemesh.stages.text.detokenizer import IncrementalDetokenizer, StopStrings
from stagemesh.stages.text.tool_calls import NamedParser, ToolCallDelta, ToolParser


class Piece(msgspec.Struct, frozen=True, gc=False):
    """New text of one choice."""

    index: int
    text: str
    finish_reason: str | None = None
    """"stop", "length" or "tool_calls" on the last piece of the choice, which may have no text."""
    logprobs: list[DecodedLogprob] = []
    """Of the tokens that came, if the request asked; their text may still be held back."""
    tool_calls: list[ToolCallDelta] = []


class Choice:
    """One answer on its way: its sequence in a lane, and the text of it so far."""

    def __init__(
        self,
        index: int,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        detokenizer: IncrementalDetokenizer,
        reporter: LogprobDecoder | None = None,
        tools: ToolParser | None = None,
    ) -> None:
        """reporter: puts text to log-probabilities, where the request asks for them. tools: reads tool calls."""
        self.index = index
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.num_tokens = 0
        """Generated tokens, up to the one that completed a stop string."""
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        """One per generated token, if `params` asks for them."""
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        """One per prompt token after the first, if `params` asks for them."""
        self.reports: list[DecodedLogprob] = []
        """`logprobs` with their text, as far as they were handed out in pieces."""
        self.tool_calls: list[ToolCall] = []
        """Whole once the pieces are exhausted."""
        self._detokenizer = detokenizer
        self._reporter = reporter
        self._tools = tools
        self._stops = StopStrings(params.stop, keep=params.include_stop_str_in_output) if params.stop else None

    async def pieces(self, lanes: LaneClient, metrics: Metrics) -> AsyncGenerator[Piece, None]:
        """Generate. Closing this, or leaving it by an error, aborts the sequence in its lane."""
        started = time.perf_counter()
        last = 0.0
        outcome = "abort"
        try:
            deltas = lanes.generate(self.prompt_token_ids, self.params, self.request_id)
            async with aclosing(deltas):
                async for delta in deltas:
                    now = time.perf_counter()
                    if last:
                        metrics.inter_token_latency.observe(now - last)
                    else:
                        metrics.time_to_first_token.observe(now - started)
                    last = now
                    text = self.accept(delta)
                    if self.finish_reason is not None:
                        break
                    piece = self._piece(text)
                    if piece.text or piece.logprobs or piece.tool_calls:
                        yield piece
                else:
                    raise LaneError("lost", "the lane ended the answer before it was complete")
            # The lane is released before a slow client takes the last piece.
            metrics.e2e_latency.observe(last - started)
            outcome = self.finish_reason
            yield self._piece(text)
        except Exception:
            outcome = "error"
            raise
        finally:
            metrics.finished[outcome].inc()

    def accept(self, delta: TokenDelta) -> str:
        """Text that became certain with `delta`; sets finish_reason with the last of it. Raises LaneError."""
        if delta.offset != self.num_tokens:
            raise LaneError(
                "internal",
                f"request {self.request_id}: tokens came from {delta.offset} on, {self.num_tokens} was next",
            )
        if delta.finish_reason == "error":
            raise LaneError("internal", delta.error or "the lane failed")
        if delta.finish_reason == "abort":
            raise LaneError("lost", delta.error or "the lane gave the request up")
        if not self.num_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
            self.prompt_logprobs = delta.prompt_logprobs
        text = self._text_of(delta)
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
            del self.logprobs[self.num_tokens :]
        if self._stops is not None and self._stops.hit:
            self.finish_reason = "stop"
        elif delta.finish_reason is not None:
            text += self._rest()
            self.finish_reason = delta.finish_reason
        return text

    def _text_of(self, delta: TokenDelta) -> str:
        token_ids = delta.token_ids
        # The token that ended the answer is counted, and its text is not part of it unless that was asked for.
        is_shown = delta.stop_token_id is None or self.params.include_stop_str_in_output
        shown = token_ids if is_shown else token_ids[:-1]
        if self._stops is None:
            self.num_tokens += len(token_ids)
            return self._detokenizer.feed(shown)
        text = ""
        for token_id in shown:
            self.num_tokens += 1
            piece = self._detokenizer.feed((token_id,))
            text += self._stops.feed(piece) if self.num_tokens > self.params.min_tokens else piece
            if self._stops.hit:
                return text
        self.num_tokens += len(token_ids) - len(shown)
        return text

    def prompt_reports(self) -> list[DecodedLogprob] | None:
        """`prompt_logprobs` with their text."""
        if self.prompt_logprobs is None or self._reporter is None:
            return None
        return self._reporter.report(self.prompt_logprobs)

    def _piece(self, text: str) -> Piece:
        """Of text that has just become certain; the last one if finish_reason is set."""
        reports: list[DecodedLogprob] = []
        if self._reporter is not None and len(self.logprobs) > len(self.reports):
            reports = self._reporter.report(self.logprobs[len(self.reports) :])
            self.reports += reports
        if self._tools is None:
            return Piece(self.index, text, self.finish_reason, reports)
        text, deltas = self._tools.feed(text)
        if self.finish_reason is not None:
            rest = self._tools.finish()
            text, deltas = text + rest.content, deltas + rest.calls
        for delta in deltas:
            if delta.name is not None and delta.id is not None:
                self.tool_calls.append(ToolCall(delta.id, FunctionCall(delta.name, delta.arguments)))
            else:
                call = self.tool_calls[-1]
                function = FunctionCall(call.function.name, call.function.arguments + delta.arguments)
                self.tool_calls[-1] = ToolCall(call.id, function)
        # A caller who names the function knows what comes: OpenAI says "stop" there.
        if self.finish_reason == "stop" and self.tool_calls and not isinstance(self._tools, NamedParser):
            self.finish_reason = "tool_calls"
        return Piece(self.index, text, self.finish_reason, reports, deltas)

    def _rest(self) -> str:
        rest = self._detokenizer.finish()
        return rest if self._stops is None else self._stops.feed(rest) + self._stops.finish()

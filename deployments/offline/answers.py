"""What `LLM` returns, put together while its tokens come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from stagemesh.deployments.ingress.choice import Choice
from stagemesh.deployments.offline.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from stagemesh.stages.messages.request import TokenDelta
from stagemesh.stages.messages.step import TokenLogprobs
from stagemesh.stages.text.tokenizer import Tokenizer


@dataclass
class GrowingChoice:
    """One answer and its tokens so far."""

    choice: Choice
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    stop_token_id: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.choice.finish_reason is not None

    def accept(self, delta: TokenDelta) -> None:
        """Raises LaneError."""
        self.texts.append(self.choice.accept(delta))
        self.token_ids += delta.token_ids
        self.stop_token_id = delta.stop_token_id

    def output(self, tokenizer: Tokenizer) -> CompletionOutput:
        choice, params = self.choice, self.choice.params
        token_ids = self.token_ids[: choice.num_tokens]
        return CompletionOutput(
            index=choice.index,
            text="".join(self.texts),
            token_ids=token_ids,
            cumulative_logprob=None if params.logprobs is None else sum(entry.logprob for entry in choice.logprobs),
            logprobs=None if params.logprobs is None else [_by_token(entry, tokenizer) for entry in choice.logprobs],
            finish_reason=choice.finish_reason,
            stop_reason=self._stop_reason(token_ids, tokenizer),
        )

    def _stop_reason(self, token_ids: list[int], tokenizer: Tokenizer) -> int | str | None:
        params = self.choice.params
        if self.choice.finish_reason != "stop":
            return None
        if self.stop_token_id is not None:
            return self.stop_token_id if self.stop_token_id in params.stop_token_ids else None
        # A stop string, complete with the last token: the one that ends first, of two the longer.
        before, whole = (
            tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens) for ids in (token_ids[:-1], token_ids)
        )
        found = [
            (start + len(stop), start, stop)
            for stop in params.stop
            if (start := whole.find(stop, max(0, len(before) - len(stop) + 1))) >= 0
        ]
        return min(found)[2] if found else None


@dataclass
class RequestState:
    """One prompt on its way."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[GrowingChoice]
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.time()))

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self.choices)

    def tick(self) -> None:
        """A token came."""
        now = self.metrics.last_token_time = time.time()
        self.metrics.first_token_time = self.metrics.first_token_time or now
        self.metrics.finished_time = now if self.is_finished else None

    def output(self, tokenizer: Tokenizer) -> RequestOutput:
        first = self.choices[0].choice
        entries = first.prompt_logprobs
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[choice.output(tokenizer) for choice in self.choices],
            prompt_logprobs=None if entries is None else [None, *(_by_token(entry, tokenizer) for entry in entries)],
            metrics=self.metrics,
            num_cached_tokens=first.num_cached_tokens,
        )


def _by_token(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The token itself, then the likeliest ones."""
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += zip(entry.top_ids, entry.top_logprobs, range(1, len(entry.top_ids) + 1), strict=True)
    return {
        token_id: Logprob(logprob, rank, tokenizer.decode([token_id], skip_special_tokens=False))
        for token_id, logprob, rank in ranked
    }

"""One request in a lane: its tokens, its blocks, and how far its KV is computed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from enum import Enum

from stagemesh.config.prefix import block_hashes, root
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.grammar import Grammar
from stagemesh.stages.engine.logits_processor import LogitsProcessor
from stagemesh.stages.messages.step import SampleSpec, TokenLogprobs


class SequenceStatus(Enum):
    WAITING = "waiting"
    """New, preempted, or its lane lost its KV."""
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Only the scheduler writes to it."""

    def __init__(
        self,
        seq_id: int,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        grammar: Grammar | None = None,
        output_token_ids: SequenceOf[int] = (),
        attempt: int = 0,
        due_at: float = 0.0,
        cache_salt: str = "",
    ) -> None:
        """output_token_ids: the answer so far, from another lane. attempt: repeated in its deltas."""
        self.seq_id = seq_id
        self.order = (due_at, seq_id)
        """Its place in both queues, kept through preemptions."""
        self.request_id = request_id
        self.attempt = attempt
        self.params = params
        self.token_ids = array("i", prompt_token_ids)
        """Prompt, then output."""
        self.token_ids.extend(output_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_num_tokens = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        """Where it ends with "length"."""
        self.block_table = array("i")
        self._root_hash = root(cache_salt)
        self.block_hashes: list[bytes] = []
        """Chained hash of each full block of known tokens, as far as needed."""
        self.num_published_blocks = 0
        """Leading blocks of its table whose content is in the prefix cache."""
        self.num_computed_tokens = 0
        """Tokens whose KV is in the cache after all scheduled steps; one may be a placeholder."""
        self.num_cached_tokens = 0
        """Prompt tokens from the prefix cache at its first admission."""
        self.num_in_flight = 0
        """Steps in flight that compute tokens of it."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens after the first, as far as they have come."""
        self.wants_prompt_logprobs = params.prompt_logprobs is not None and not output_token_ids
        """They come with the first token."""
        self.was_admitted = False
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.error = ""
        self.stop_token_id: int | None = None
        self._prepare_sampling(eos_token_ids, LogitsProcessor.of(params, prompt_token_ids, grammar))

    def _prepare_sampling(self, eos_token_ids: Iterable[int], logits_processor: LogitsProcessor | None) -> None:
        params = self.params
        assert params.seed is not None, "a request has a seed before it reaches a leader"
        eos, stop = set(eos_token_ids), set(params.stop_token_ids)
        self.stop_token_ids = frozenset(stop if params.ignore_eos else stop | eos)
        self.banned_token_ids = sorted(stop | eos)
        """Not sampled before min_tokens exist."""
        self._logits_processor = logits_processor
        self.has_logits_processor = self._logits_processor is not None
        """Its next token depends on its tokens beside the model: it cannot follow a placeholder."""
        self._logprob_ids = list(params.logprob_token_ids or ())
        self._spec = (params.temperature, params.top_p, max(params.top_k, 0), params.min_p, params.seed & (2**64 - 1))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        return self.wants_prompt_logprobs and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens not scheduled yet."""
        num_tokens = len(self.token_ids) - self.num_computed_tokens
        return num_tokens if num_tokens > 0 else 0  # max() would take twice as long, in every loop of the scheduler

    @property
    def needs_all_hidden(self) -> bool:
        pooling = self.params.pooling
        return self.needs_prompt_logprobs or (pooling is not None and pooling.pooling == "mean")

    def hash_blocks(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of its first `num_blocks` blocks, all full of known tokens."""
        known = len(self.block_hashes)
        if known < num_blocks:
            tokens = self.token_ids[known * block_size : num_blocks * block_size]
            parent = self.block_hashes[-1] if known else self._root_hash
            self.block_hashes += block_hashes(tokens, block_size, parent)
        return self.block_hashes[:num_blocks]

    def sample_spec(self, position: int) -> SampleSpec:
        """How to sample the token at `position` of `token_ids`."""
        must_go_on = position - self.num_prompt_tokens < self.params.min_tokens
        banned_token_ids = self.banned_token_ids if must_go_on else []
        edits = None
        if self._logits_processor is not None:
            output_token_ids = self.token_ids[self.num_prompt_tokens : position]
            banned_token_ids = banned_token_ids + self._logits_processor.bad_endings(output_token_ids)
            edits = self._logits_processor.adjustments(output_token_ids, banned_token_ids)
            if edits.allowed:
                banned_token_ids = []  # the mask says it
        return SampleSpec(*self._spec, position, banned_token_ids, edits, self.params.logprobs, self._logprob_ids)

    def take_prompt_logprobs(self, start: int, logprobs: SequenceOf[TokenLogprobs]) -> None:
        """Of the prompt's tokens from `start` on. Those from before a preemption stay."""
        self.prompt_logprobs += logprobs[len(self.prompt_logprobs) + 1 - start :]

    def fail(self, error: str, reason: str = "error") -> None:
        """reason: as in TokenDelta.finish_reason."""
        self.finish_reason, self.error = reason, error

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason, self.stop_token_id = "stop", token_id
            if self._logits_processor is not None and self._logits_processor.error:
                self.finish_reason, self.error = "unsatisfiable", self._logits_processor.error
        elif len(self.token_ids) >= self.max_num_tokens:
            self.finish_reason = "length"

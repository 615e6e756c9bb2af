"""Decides which tokens of which sequences the lane computes in the next step, and processes the results.

Each step fills one token budget: one token for each decoding sequence whose last token is known, then for those whose
last token a step in flight samples, then further chunks of begun prompts, then new prompts, each first come, first
served. `sequence_queues.py` decides which sequences run.

`num_micro_batches` steps in flight keep as many stages busy. Async scheduling adds one, so that no stage waits while a
result travels to the leader and a plan back. Its placeholders stand for tokens that are not sampled yet; the workers
fill them in. If such a sequence has ended meanwhile, that part of the step is wasted work. Async scheduling pauses
while a request with a logits processor runs: it cannot use placeholders, and the others would advance twice as often.

A sequence that cannot go on ends with an error of its own. After a step that failed as a whole, its sequences are tried
one at a time (`quarantine.py`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import chain, repeat

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.block_manager import BlockManager
from stagemesh.stages.engine.forecast import Forecast
from stagemesh.stages.engine.grammar import Grammar
from stagemesh.stages.engine.quarantine import Quarantine
from stagemesh.stages.engine.sequence import Sequence, SequenceStatus
from stagemesh.stages.engine.sequence_queues import SequenceQueues
from stagemesh.stages.engine.stats import SchedulerStats
from stagemesh.stages.engine.step import ScheduledSequence, ScheduledStep
from stagemesh.stages.messages.request import TokenDelta
from stagemesh.stages.messages.step import NOTHING_ALLOWED, StepResult, TokenLogprobs

logger = logging.getLogger(__name__)

PRIORITY_S = 10.0
"""A request goes before those that came up to this much earlier for each step of priority, so none starves."""
MIN_SHARE_TOKENS = 256
"""Balance makes no micro-batch smaller than this: below it a forward pass takes the same time."""


class Scheduler:
    """Continuous batching. `schedule` and `process_result` take steps in the same order."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_micro_batches: int = 1,
        eos_token_ids: Iterable[int] = (),
        enable_prefix_caching: bool = True,
        max_queued_requests: int | None = None,
    ) -> None:
        """max_queued_requests: as in EngineArgs; only reported, in `stats`."""
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.queues = SequenceQueues(self.blocks, max_num_seqs)
        self.quarantine = Quarantine()
        self._forecast = Forecast()
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_queued_requests = max_queued_requests
        self.num_micro_batches = num_micro_batches
        self.eos_token_ids = tuple(eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[ScheduledStep] = deque()
        self._next_seq_id = 0
        self._generation_tokens = 0

    # ---- requests ------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
        *,
        output_token_ids: SequenceOf[int] = (),
        attempt: int = 0,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Sequence:
        """Raises ConfigError if the request can never run here, or if its id is in use by no older attempt.

        output_token_ids: the answer so far, from another lane; this one goes on behind it.
        """
        num_prompt = len(prompt_token_ids)
        older = self._sequences.get(request_id)
        if older is not None and older.attempt >= attempt:
            raise ConfigError("request_id", request_id, "a request with this id is still running")
        if num_prompt == 0:
            raise ConfigError("prompt", [], "must hold at least one token")
        if num_prompt + (params.pooling is None) > self.max_model_len:
            reason = f"its {num_prompt} tokens leave no room for an answer in max_model_len={self.max_model_len}"
            raise ConfigError("prompt", "…", reason)
        sequence = Sequence(
            self._next_seq_id,
            request_id,
            prompt_token_ids,
            params,
            eos_token_ids=self.eos_token_ids,
            max_model_len=self.max_model_len,
            grammar=grammar,
            output_token_ids=output_token_ids,
            attempt=attempt,
            due_at=time.monotonic() + PRIORITY_S * priority,
            cache_salt=cache_salt,
        )
        self._check_room(sequence)
        self.abort_request(request_id)
        self._next_seq_id += 1
        self._sequences[request_id] = sequence
        self.queues.add(sequence)
        return sequence

    def _check_room(self, sequence: Sequence) -> None:
        if sequence.num_output_tokens and sequence.num_tokens >= sequence.max_num_tokens:
            raise ConfigError("output_token_ids", "…", f"{sequence.num_output_tokens} tokens are a whole answer")
        # The KV of the last token is never computed. A sequence that fits alone can always be finished: at worst every
        # later one is preempted for the oldest.
        capacity = self.blocks.num_blocks * self.block_size
        if sequence.max_num_tokens - 1 > capacity:
            what = f"its {sequence.num_prompt_tokens} tokens and max_tokens={sequence.params.max_tokens}"
            reason = (
                f"{what} may need {sequence.max_num_tokens - 1} tokens of KV cache "
                f"(max_model_len={self.max_model_len}), there are {capacity}"
            )
            raise ConfigError("prompt", "…", reason)

    def abort_request(self, request_id: str) -> Sequence | None:
        """Frees its blocks at once, in flight or not. None if the id is unknown."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            sequence.finish_reason = "abort"
            self._finish(sequence)
        return sequence

    def preempt_all(self) -> None:
        """The KV is lost: running sequences wait again; steps in flight are dropped."""
        self._in_flight.clear()
        self.queues.preempt_all()

    def reset_prefix_cache(self) -> bool:
        """Forget what is cached. False, and nothing done, while a sequence holds KV."""
        is_idle = self.blocks.num_free_blocks == self.blocks.num_blocks
        if is_idle:
            self.blocks.reset_prefix_cache()
        return is_idle

    def blame(self, step: ScheduledStep, reason: str, *, is_hang: bool = False) -> list[TokenDelta]:
        """After `preempt_all`: `step` failed. Its sequences are tried alone; one that failed alone ends with an error.

        is_hang: it had no result in time, rather than that it raised.
        """
        sequences = [entry.sequence for entry in step.entries if entry.sequence.status is not SequenceStatus.FINISHED]
        return [self._fail(sequence, reason) for sequence in self.quarantine.accuse(sequences, is_hang=is_hang)]

    def _fail(self, sequence: Sequence, error: str, reason: str = "error") -> TokenDelta:
        logger.error("request %s ends: %s", sequence.request_id, error)
        sequence.fail(error, reason)
        self._finish(sequence)
        offset, cached = sequence.num_output_tokens, sequence.num_cached_tokens
        return TokenDelta(sequence.request_id, offset, [], reason, None, cached, error, attempt=sequence.attempt)

    def _finish(self, sequence: Sequence) -> None:
        self.queues.finish(sequence)
        self.quarantine.forget(sequence)
        if sequence.finish_reason in ("stop", "length") and sequence.num_output_tokens:
            self._forecast.ended(sequence.num_output_tokens)
        del self._sequences[sequence.request_id]

    # ---- results -------------------------------------------------------------------------------------------

    def process_result(self, step: ScheduledStep, result: StepResult) -> list[TokenDelta]:
        """Of `step`, the oldest in flight. Sequences aborted meanwhile get no delta."""
        assert self._in_flight and self._in_flight[0] is step, "results come in the order of the steps"
        self._in_flight.popleft()
        for entry in step.entries:
            entry.sequence.num_in_flight -= 1
        reported = [entry for entry in step.entries if entry.num_prompt_logprobs]
        for entry, prompt_logprobs in zip(reported, result.prompt_logprobs, strict=True):
            entry.sequence.take_prompt_logprobs(entry.start + 1, prompt_logprobs)
        deltas = []
        for sequence, vector in zip(step.pooled, result.pooled, strict=True):
            if sequence.status is not SequenceStatus.FINISHED:
                deltas.append(self._take_embedding(sequence, vector))
        logprobs = result.logprobs or repeat(None, len(step.sampled))
        for sequence, token_id, logprob in zip(step.sampled, result.token_ids, logprobs, strict=True):
            if sequence.status is not SequenceStatus.FINISHED:
                deltas.append(self._take_token(sequence, token_id, logprob))
        return deltas

    def _take_token(self, sequence: Sequence, token_id: int, logprob: TokenLogprobs | None) -> TokenDelta:
        if token_id == NOTHING_ALLOWED:
            return self._fail(sequence, "the request rules every token out", "unsatisfiable")
        if token_id < 0:
            return self._fail(sequence, "no token could be sampled: the model's logits are not finite")
        offset = sequence.num_output_tokens
        sequence.append(token_id)
        self._generation_tokens += 1
        was_cleared = self.quarantine.took_token(sequence)
        if sequence.finish_reason is not None:
            self._finish(sequence)
        elif was_cleared:
            self.queues.preempt(sequence)  # the next suspect needs its blocks
        sends_prompt_logprobs = offset == 0 and sequence.wants_prompt_logprobs
        return TokenDelta(
            sequence.request_id,
            offset,
            [token_id],
            sequence.finish_reason,
            sequence.stop_token_id,
            sequence.num_cached_tokens,
            sequence.error,
            None if logprob is None else [logprob],
            sequence.prompt_logprobs if sends_prompt_logprobs else None,
            attempt=sequence.attempt,
        )

    def _take_embedding(self, sequence: Sequence, vector: bytes) -> TokenDelta:
        if not vector:
            return self._fail(sequence, "the prompt has no vector: its values are not finite")
        sequence.finish_reason = "stop"
        self._finish(sequence)
        cached, attempt = sequence.num_cached_tokens, sequence.attempt
        return TokenDelta(
            sequence.request_id, 0, [], "stop", num_cached_tokens=cached, embedding=vector, attempt=attempt
        )

    # ---- one step ------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None until a result or a request comes."""
        if (suspect := self.quarantine.current) is not None:
            return None if self._in_flight else self._schedule_alone(suspect)
        is_async = not any(sequence.has_logits_processor for sequence in self.queues.running)
        if len(self._in_flight) >= self.num_micro_batches + is_async:
            return None
        step = ScheduledStep()
        self._schedule_decodes(step, is_async)
        self._schedule_prompts(step)
        self.queues.cache_filled_blocks()
        if not step.entries:
            return None
        self._in_flight.append(step)
        return step

    def _schedule_alone(self, sequence: Sequence) -> ScheduledStep:
        """Nothing else runs or is in flight: it fits, as `add_request` has checked."""
        if sequence.status is SequenceStatus.WAITING:
            self.queues.admit(sequence)
        has_room = sequence.status is SequenceStatus.RUNNING and self.queues.reserve_block(sequence)
        assert has_room, "a sequence alone has all blocks"
        step = ScheduledStep()
        self._schedule_tokens(step, sequence, min(sequence.num_uncomputed_tokens, self.max_num_batched_tokens))
        self.queues.cache_filled_blocks()
        self._in_flight.append(step)
        return step

    def _schedule_decodes(self, step: ScheduledStep, is_async: bool) -> None:
        decoding = [sequence for sequence in self.queues.running if sequence.num_uncomputed_tokens <= 1]
        # Evenly many per micro-batch, oldest first; the others make the next one at once if one is free.
        max_decodes = min(-(-len(decoding) // self.num_micro_batches), self.max_num_batched_tokens)
        for sequence in decoding:
            if len(step.entries) == max_decodes:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for an older one in this very loop
            if sequence.num_uncomputed_tokens == 1:
                if self.queues.reserve_block(sequence):
                    self._schedule_tokens(step, sequence, 1)
                else:
                    is_async = False  # else every preemption candidate could stay in flight and this one would starve
        if is_async:
            self._schedule_placeholders(step, max_decodes)

    def _schedule_placeholders(self, step: ScheduledStep, max_decodes: int) -> None:
        """Decodes whose last token the oldest step in flight with any of them samples."""
        for index, in_flight in enumerate(self._in_flight):
            for row, sequence in enumerate(in_flight.sampled):
                if len(step.entries) == max_decodes:
                    return
                if sequence.status is not SequenceStatus.RUNNING or sequence.num_computed_tokens != sequence.num_tokens:
                    continue  # it ended, or is in a later step already
                if sequence.num_tokens + 1 == sequence.max_num_tokens:
                    continue  # that token is its last
                if not self.queues.reserve_block(sequence):
                    return
                step.placeholder_steps_back = len(self._in_flight) - index
                self._schedule_tokens(step, sequence, 1, row)
            if step.placeholder_steps_back:
                return

    def _schedule_prompts(self, step: ScheduledStep) -> None:
        share = self._token_share(step)
        for sequence in self.queues.running:
            if step.num_tokens >= share:
                return
            if sequence.num_uncomputed_tokens > 1:
                self._schedule_tokens(step, sequence, min(sequence.num_uncomputed_tokens, share - step.num_tokens))
        while step.num_tokens < share and (admitted := self.queues.admit()) is not None:
            self._schedule_tokens(step, admitted, min(admitted.num_uncomputed_tokens, share - step.num_tokens))

    def _token_share(self, step: ScheduledStep) -> int:
        """Most tokens of `step`: a backlog of prompts is spread evenly over the micro-batches."""
        if self.num_micro_batches == 1:
            return self.max_num_batched_tokens
        enough = self.max_num_batched_tokens * self.num_micro_batches
        num_tokens = step.num_tokens + sum(other.num_tokens for other in self._in_flight)
        for sequence in chain(self.queues.running, self.queues.waiting):
            if num_tokens >= enough:
                break
            num_tokens += sequence.num_uncomputed_tokens
        share = -(-num_tokens // self.num_micro_batches)
        return min(max(share, MIN_SHARE_TOKENS), self.max_num_batched_tokens)

    def _schedule_tokens(
        self, step: ScheduledStep, sequence: Sequence, num_tokens: int, placeholder_row: int | None = None
    ) -> None:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        num_prompt_logprobs = 0
        if sequence.needs_prompt_logprobs:
            num_prompt_logprobs = max(0, min(end, sequence.num_prompt_tokens - 1) - start)
        table = sequence.block_table[: -(-end // self.block_size)]
        is_sampled = end >= sequence.num_tokens
        entry = ScheduledSequence(sequence, table, start, num_tokens, is_sampled, num_prompt_logprobs, placeholder_row)
        step.append(entry)
        sequence.num_computed_tokens = end
        sequence.num_in_flight += 1
        if end // self.block_size > sequence.num_published_blocks:
            self.queues.mark_filled(sequence)

    # ---- what it says about itself -------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> SchedulerStats:
        running, waiting = self.queues.running, self.queues.waiting
        return SchedulerStats(
            num_running=len(running),
            num_waiting=len(waiting),
            room=self._room(),
            queued_prefill_tokens=sum(sequence.num_uncomputed_tokens for sequence in chain(running, waiting)),
            running_kv_tokens=sum(sequence.num_computed_tokens for sequence in running),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free_blocks,
            num_preemptions=self.queues.num_preemptions,
            prefix_queries=self.queues.prefix_queries,
            prefix_hits=self.queues.prefix_hits,
            prompt_tokens=self.queues.prompt_tokens,
            generation_tokens=self._generation_tokens,
        )

    def _room(self) -> int:
        """See LaneStats.room."""
        running = self.queues.running
        num_places = len(running) if self.queues.lacks_blocks else self.queues.max_num_seqs
        if self.max_queued_requests is not None:
            return num_places + self.max_queued_requests
        return num_places + self._forecast.num_ending(running, self._generation_tokens)

"""Decides which tokens of which sequences the lane computes next, and keeps their state. No torch, no Ray.

The leader's loop: `schedule` → `to_plan` → send → (result arrives) → `process_result`, results in order.
Each `schedule` fills one token budget: first one token for each decoding sequence whose last token is known, then for
those whose last token a step in flight samples, then further chunks of prompts already begun, then new prompts,
each first come, first served.

`num_micro_batches` steps in flight keep as many stages busy. One more is planned ahead, so that the stage which ends
its step has the next one at hand: while a result travels to the leader and a plan back, it need not stand still. A plan
ahead leaves out the tokens that nobody knows yet; the workers put them in. If such a sequence turns out to have ended,
its part of the plan was in vain. While a request runs whose next token depends on its tokens by more than the model
(penalties, a grammar), nothing is planned ahead: the others would get on twice as often as it.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.block_manager import BlockManager, check
from stagemesh.stages.engine.grammar import Grammar
from stagemesh.stages.engine.sequence import Sequence, SequenceStatus
from stagemesh.stages.engine.step import ScheduledSequence, ScheduledStep
from stagemesh.stages.messages.step import TokenLogprobs

MIN_SHARE_TOKENS = 256
"""A micro-batch is not made smaller than this for balance: below it a forward pass costs about the same
whatever its size, and cutting a short prompt in pieces would only delay its first token."""

COUNTS = (
    "num_running",
    "num_waiting",
    "queued_prefill_tokens",
    "running_kv_tokens",
    "num_blocks",
    "num_free_blocks",
    "num_preemptions",
    "prefix_queries",
    "prefix_hits",
    "prompt_tokens",
    "generation_tokens",
)
"""The scheduler's part of a LaneStats."""

_by_arrival = attrgetter("arrival")


class SequenceUpdate(NamedTuple):
    """What one step brought for one sequence."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None
    """"stop", "length" or "error" when these were its last tokens."""
    stop_token_id: int | None
    """The stop or EOS id that ended it, also the last of `token_ids`."""
    num_cached_tokens: int
    """Prompt tokens that came from the prefix cache; the same in every update of a request."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token id, if the request asked for them."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the first token, if the request asked for them."""
    error: str = ""
    """With finish_reason "error": what went wrong."""
    embedding: bytes = b""
    """float32: the prompt's vector, if the request asked for that instead of tokens."""


class Scheduler:
    """Continuous batching over one block pool. Used from one thread; never blocks."""

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
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.num_micro_batches = num_micro_batches
        self.eos_token_ids = tuple(eos_token_ids)
        # Both are in order of arrival at all times; a preempted sequence keeps its place in that order.
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[ScheduledStep] = deque()
        self._next_seq_id = 0
        # Blocks that the step being built fills, by hash: published when it is closed.
        self._filled: dict[bytes, int] = {}

        self.num_preemptions = 0
        self.prefix_queries = 0
        """Prompt tokens looked up in the prefix cache, once per request."""
        self.prefix_hits = 0
        """Prompt tokens found there."""
        self.prompt_tokens = 0
        """Prompt tokens of the requests admitted so far."""
        self.generation_tokens = 0

    # ---- requests ------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
    ) -> Sequence:
        """Queues a request. Raises ConfigError if it could never run here, or if its id is in use.

        grammar: made from `params.structured_outputs`, for this request alone.
        """
        num_prompt = len(prompt_token_ids)
        if request_id in self._sequences:
            raise ConfigError("request_id", request_id, "a request with this id is still running")
        if num_prompt == 0:
            raise ConfigError("prompt", [], "must hold at least one token")
        if num_prompt + (params.pooling is None) > self.max_model_len:
            raise ConfigError(
                "prompt",
                "…",
                f"its {num_prompt} tokens leave no room for an answer in max_model_len={self.max_model_len}",
            )
        sequence = Sequence(
            self._next_seq_id,
            request_id,
            prompt_token_ids,
            params,
            eos_token_ids=self.eos_token_ids,
            max_model_len=self.max_model_len,
            grammar=grammar,
        )
        # The last token is only given out, its KV is never computed. Who fits alone can always be finished:
        # in the worst case everybody who came later is preempted for the oldest.
        capacity = self.blocks.num_blocks * self.block_size
        if sequence.max_num_tokens - 1 > capacity:
            raise ConfigError(
                "prompt",
                "…",
                f"its {num_prompt} tokens and max_tokens={params.max_tokens} may need "
                f"{sequence.max_num_tokens - 1} tokens of KV cache (max_model_len={self.max_model_len}), "
                f"there are {capacity}",
            )
        self._next_seq_id += 1
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)
        return sequence

    def abort_request(self, request_id: str) -> None:
        """Forgets a request and frees its blocks at once, in flight or not. Ignores an unknown id."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            sequence.finish_reason = "abort"
            self._finish(sequence)

    def preempt_all(self) -> None:
        """The lane's KV is lost: running sequences wait again with the tokens they have, and steps in
        flight are forgotten (their results, should they still come, must not be given to `process_result`)."""
        self._in_flight.clear()
        for sequence in self._running:
            sequence.num_in_flight = 0
            self._release_blocks(sequence)
        self._waiting = deque(sorted([*self._running, *self._waiting], key=_by_arrival))
        self._running.clear()
        self.blocks.reset_prefix_cache()

    # ---- one step ------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None when nothing can be done before a result comes back or a request arrives."""
        looks_ahead = not any(sequence.has_logits_processor for sequence in self._running)
        if len(self._in_flight) >= self.num_micro_batches + looks_ahead:
            return None
        step = ScheduledStep()
        self._schedule_decodes(step, looks_ahead)
        self._schedule_prompts(step)
        for block_hash, block in self._filled.items():
            self.blocks.cache_block(block, block_hash)
        self._filled.clear()
        if not step.entries:
            return None
        self._in_flight.append(step)
        return step

    def process_result(
        self,
        step: ScheduledStep,
        token_ids: SequenceOf[int],
        logprobs: SequenceOf[TokenLogprobs | None] = (),
        prompt_logprobs: SequenceOf[list[TokenLogprobs]] = (),
        pooled: SequenceOf[bytes] = (),
    ) -> list[SequenceUpdate]:
        """Takes the result of the oldest step in flight: one token per sampled sequence, in plan order, and what
        was asked for beside it, as in StepResult.

        Sequences aborted meanwhile are left out of the answer.
        """
        assert self._in_flight and self._in_flight[0] is step, "results come in plan order"
        self._in_flight.popleft()
        for entry in step.entries:
            entry.sequence.num_in_flight -= 1
        asked = [entry for entry in step.entries if entry.num_prompt_logprobs]
        for entry, report in zip(asked, prompt_logprobs, strict=True):
            entry.sequence.take_prompt_logprobs(entry.start + 1, report)
        whole = [e.sequence for e in step.entries if e.is_sampled and e.sequence.params.pooling is not None]
        updates = self._embedded(whole, pooled)
        sampled = step.sampled
        reports = logprobs or [None] * len(sampled)
        for sequence, token_id, logprob in zip(sampled, token_ids, reports, strict=True):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.append(token_id)
            self.generation_tokens += 1
            if sequence.finish_reason is not None:
                self._finish(sequence)
            updates.append(
                SequenceUpdate(
                    sequence.request_id,
                    [token_id],
                    sequence.finish_reason,
                    sequence.stop_token_id,
                    sequence.num_cached_tokens,
                    None if logprob is None else [logprob],
                    self._prompt_logprobs_of(sequence),
                    sequence.error,
                )
            )
        return updates

    def _embedded(self, sequences: SequenceOf[Sequence], vectors: SequenceOf[bytes]) -> list[SequenceUpdate]:
        updates = []
        for sequence, vector in zip(sequences, vectors, strict=True):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.finish_reason = "stop"
            self._finish(sequence)
            cached = sequence.num_cached_tokens
            updates.append(SequenceUpdate(sequence.request_id, [], "stop", None, cached, embedding=vector))
        return updates

    def _prompt_logprobs_of(self, sequence: Sequence) -> list[TokenLogprobs] | None:
        if sequence.params.prompt_logprobs is None or sequence.num_output_tokens != 1:
            return None
        return sequence.prompt_logprobs

    def _schedule_decodes(self, step: ScheduledStep, looks_ahead: bool) -> None:
        decoding = [sequence for sequence in self._running if sequence.num_uncomputed_tokens <= 1]
        # Evenly many per micro-batch, oldest first; the others make the next one at once if one is free.
        max_decodes = min(-(-len(decoding) // self.num_micro_batches), self.max_num_batched_tokens)
        for sequence in decoding:
            if len(step.entries) == max_decodes:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted for an older one in this very loop
            if sequence.num_uncomputed_tokens == 1:
                if self._reserve_block(sequence):
                    self._schedule_tokens(step, sequence, 1)
                else:
                    looks_ahead = False  # or whoever could make room for it would be in flight for ever
        if looks_ahead:
            self._schedule_ahead(step, max_decodes)

    def _schedule_ahead(self, step: ScheduledStep, max_decodes: int) -> None:
        """Decodes whose last token the oldest step in flight samples that has any."""
        for index, feeder in enumerate(self._in_flight):
            for row, sequence in enumerate(feeder.sampled):
                if len(step.entries) == max_decodes:
                    return
                if sequence.status is not SequenceStatus.RUNNING or not sequence.is_wholly_planned:
                    continue  # it ended, or is in a later plan already
                if sequence.num_tokens + 1 == sequence.max_num_tokens:
                    continue  # that token is its last
                if not self._reserve_block(sequence):
                    return
                step.placeholder_steps_back = len(self._in_flight) - index
                self._schedule_tokens(step, sequence, 1, row)
            if step.placeholder_steps_back:
                return

    def _schedule_prompts(self, step: ScheduledStep) -> None:
        share = self._token_share(step)
        for sequence in self._running:
            if step.num_tokens >= share:
                return
            if sequence.num_uncomputed_tokens > 1:
                num_tokens = min(sequence.num_uncomputed_tokens, share - step.num_tokens)
                self._schedule_tokens(step, sequence, num_tokens)
        while self._waiting and step.num_tokens < share and self._admit(self._waiting[0]):
            sequence = self._waiting.popleft()
            num_tokens = min(sequence.num_uncomputed_tokens, share - step.num_tokens)
            self._schedule_tokens(step, sequence, num_tokens)

    def _token_share(self, step: ScheduledStep) -> int:
        """Tokens that `step` may hold, so that a backlog of prompts is spread over the micro-batches.

        A long prompt cut in `num_micro_batches` chunks keeps all stages busy at once, and no heavy
        micro-batch makes light ones behind it wait.
        """
        if self.num_micro_batches == 1:
            return self.max_num_batched_tokens
        enough = self.max_num_batched_tokens * self.num_micro_batches
        num_tokens = step.num_tokens + sum(other.num_tokens for other in self._in_flight)
        for sequence in chain(self._running, self._waiting):
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
        is_sampled = end >= sequence.num_tokens
        num_prompt_logprobs = 0
        if sequence.needs_prompt_logprobs:
            num_prompt_logprobs = max(0, min(end, sequence.num_prompt_tokens - 1) - start)
        block_table = sequence.block_table[: -(-end // self.block_size)]
        step.entries.append(
            ScheduledSequence(
                sequence, block_table, start, num_tokens, is_sampled, num_prompt_logprobs, placeholder_row
            )
        )
        step.num_tokens += num_tokens
        sequence.num_computed_tokens = end
        sequence.num_in_flight += 1
        for block_hash, block in self._newly_full(sequence):
            self._filled.setdefault(block_hash, block)

    def _newly_full(self, sequence: Sequence) -> Iterable[tuple[bytes, int]]:
        """Hash and number of each block that scheduled plans fill with known tokens, once."""
        if not self.blocks.enable_prefix_caching:
            return ()
        first = sequence.num_published_blocks
        last = min(sequence.num_computed_tokens, sequence.num_tokens) // self.block_size
        if first >= last:
            return ()
        sequence.num_published_blocks = last
        return zip(sequence.hash_blocks(last, self.block_size)[first:], sequence.block_table[first:last], strict=True)

    # ---- room for sequences --------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence) -> bool:
        """Moves the first waiting sequence to the running ones, with blocks for all of its known tokens.

        All of them at once, so that a prompt once begun never stops half-way for want of blocks.
        """
        # One spare block per running sequence, or a newcomer is preempted again at the next block boundary.
        num_spare = len(self._running)
        if num_spare >= self.max_num_seqs or not self.blocks.can_allocate(1 + num_spare):
            return False
        shared: list[int] = []
        # The hidden states of cached tokens are not cached with them.
        if self.blocks.enable_prefix_caching and not sequence.needs_all_hidden:
            # At least the last token is computed: sampling needs its hidden state, and that is not cached.
            hashes = sequence.hash_blocks((sequence.num_tokens - 1) // self.block_size, self.block_size)
            shared = self.blocks.match_prefix(hashes)
            if len(shared) < len(hashes) and hashes[len(shared)] in self._filled:
                # This very step fills the block that it misses: a step later it need not be computed again.
                return False
        num_new = -(-sequence.num_tokens // self.block_size) - len(shared)
        if not self.blocks.can_allocate(num_new + num_spare, shared):
            return False
        sequence.block_table = array("i", self.blocks.allocate(num_new, shared))
        sequence.num_published_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * self.block_size
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_by_arrival)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.prompt_tokens += sequence.num_prompt_tokens
            if self.blocks.enable_prefix_caching:
                self.prefix_queries += sequence.num_prompt_tokens
                self.prefix_hits += sequence.num_cached_tokens
        return True

    def _reserve_block(self, sequence: Sequence) -> bool:
        """A block for the token that `sequence` computes next, if need be by preempting who came later.

        False: nobody can be preempted right now, the sequence has to wait for a step in flight.
        """
        if sequence.num_computed_tokens < len(sequence.block_table) * self.block_size:
            return True
        while not self.blocks.can_allocate(1):
            victim = self._pick_victim()
            if victim is None or victim.arrival <= sequence.arrival:
                # Only ever the later one yields: the oldest sequence always gets on, so all of them end.
                return False
            self._preempt(victim)
        sequence.block_table.extend(self.blocks.allocate(1))
        return True

    def _pick_victim(self) -> Sequence | None:
        """The running sequence that came last among those in no plan, whose work would be thrown away."""
        for sequence in reversed(self._running):
            if sequence.num_in_flight == 0:
                return sequence
        return None

    def _preempt(self, sequence: Sequence) -> None:
        """Takes its blocks; it waits with the tokens that it has. Its KV may survive as cached blocks."""
        self._running.remove(sequence)
        self._release_blocks(sequence)
        self.num_preemptions += 1
        # Almost always to the very front, since who waits came later than who ran.
        position = 0
        while position < len(self._waiting) and self._waiting[position].arrival < sequence.arrival:
            position += 1
        self._waiting.insert(position, sequence)

    def _release_blocks(self, sequence: Sequence) -> None:
        for block_hash, block in self._newly_full(sequence):  # a token planned ahead that is known by now
            self.blocks.cache_block(block, block_hash)
        self.blocks.release(sequence.block_table)
        sequence.block_table = array("i")
        sequence.num_published_blocks = 0
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._release_blocks(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request_id]

    # ---- what a leader says about itself ---------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._sequences)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled whose result has not come."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_blocks(self) -> int:
        return self.blocks.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Free or evictable."""
        return self.blocks.num_free_blocks

    @property
    def queued_prefill_tokens(self) -> int:
        """Known tokens whose KV is not scheduled yet, of waiting and of partly computed sequences."""
        running = sum(sequence.num_uncomputed_tokens for sequence in self._running)
        return running + sum(sequence.num_tokens for sequence in self._waiting)

    @property
    def running_kv_tokens(self) -> int:
        """Tokens that the running sequences attend to; a shared block counts once per holder."""
        return sum(sequence.num_computed_tokens for sequence in self._running)

    def counts(self) -> dict[str, int]:
        """The fields in COUNTS. O(requests)."""
        return {name: getattr(self, name) for name in COUNTS}

    def check_integrity(self) -> None:
        """Raises AssertionError unless queues, tables and block pool agree. O(blocks + tokens); for tests."""
        self.blocks.check_integrity([sequence.block_table for sequence in self._running])
        queues = {SequenceStatus.RUNNING: self._running, SequenceStatus.WAITING: self._waiting}
        for status, queue in queues.items():
            arrivals = [sequence.arrival for sequence in queue]
            check(arrivals == sorted(set(arrivals)), f"{status}: not in order of arrival: {arrivals}")
            check(all(sequence.status is status for sequence in queue), f"{status}: one is not")
        queued = {sequence.request_id: sequence for sequence in (*self._running, *self._waiting)}
        check(queued == self._sequences, "requests and queues differ")
        check(len(self._running) <= self.max_num_seqs, "more than max_num_seqs are running")
        check(len(self._in_flight) <= self.num_micro_batches + 1, "too many steps in flight")
        check(not self._filled, "blocks filled by a closed step are not published")
        in_flight = [entry.sequence.seq_id for step in self._in_flight for entry in step.entries]
        for sequence in queued.values():
            name = f"sequence {sequence.seq_id}"
            num_slots = len(sequence.block_table) * self.block_size
            num_computed = sequence.num_computed_tokens
            num_ahead = min(1, max(0, sequence.num_in_flight - 1))
            check(num_computed <= num_slots, f"{name}: computed without a slot")
            check(num_computed <= sequence.num_tokens + num_ahead, f"{name}: computed without a token")
            check(sequence.num_in_flight == in_flight.count(sequence.seq_id), f"{name}: plans in flight")
            check(sequence.num_tokens < sequence.max_num_tokens, f"{name}: is too long and still there")
            if sequence.status is SequenceStatus.WAITING:
                check(num_slots == 0 and sequence.num_in_flight == 0, f"{name}: waits, but has blocks")
            if self.blocks.enable_prefix_caching:
                num_full = min(num_computed, sequence.num_tokens) // self.block_size
                hashes = sequence.hash_blocks(num_full, self.block_size)
                full, rest = sequence.block_table[:num_full], sequence.block_table[num_full:]
                check(sequence.num_published_blocks <= num_full, f"{name}: a block is published before it is full")
                self.blocks.check_contents(full, hashes, rest)

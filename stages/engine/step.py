"""One step as scheduled, and its plan for the workers."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from stagemesh.stages.engine.sequence import Sequence
from stagemesh.stages.messages.step import PoolSpec, PromptLogprobsSpec, SampleSpec, StepPlan

_UNUSED = array("i", [-1]).tobytes()
"""Pads a block table."""


class ScheduledSequence(NamedTuple):
    """What one step computes of one sequence: tokens [start, start + num_tokens)."""

    sequence: Sequence
    block_table: array[int]
    """A copy, as far as this step reaches."""
    start: int
    num_tokens: int
    is_sampled: bool
    """The step reaches the last known token or the placeholder after it."""
    num_prompt_logprobs: int
    """Of these tokens, those followed by a prompt token whose log-probability is wanted."""
    placeholder_row: int | None
    """Not None: its only token is a placeholder, for this row of the step that samples it."""


class ScheduledStep:
    """`to_plan` may be called at any later time and gives the same plan."""

    __slots__ = ("entries", "num_tokens", "placeholder_steps_back", "pooled", "sampled")

    def __init__(self) -> None:
        self.entries: list[ScheduledSequence] = []
        self.sampled: list[Sequence] = []
        """Sequences that it samples a token for, in plan order."""
        self.pooled: list[Sequence] = []
        """Sequences whose embedding it completes, in plan order."""
        self.num_tokens = 0
        self.placeholder_steps_back = 0
        """How many steps back its placeholders are sampled; 0 if it has none."""

    def append(self, entry: ScheduledSequence) -> None:
        self.entries.append(entry)
        self.num_tokens += entry.num_tokens
        if entry.is_sampled:
            (self.sampled if entry.sequence.params.pooling is None else self.pooled).append(entry.sequence)

    @property
    def has_decodes(self) -> bool:
        """Whether it computes sampled tokens."""
        return any(entry.start >= entry.sequence.num_prompt_tokens for entry in self.entries)

    def to_plan(self, epoch: int, step: int) -> StepPlan:
        max_blocks = max(len(entry.block_table) for entry in self.entries)
        seq_ids: list[int] = []
        query_lens, context_lens, token_ids = array("i"), array("i"), array("i")
        tables: list[bytes] = []
        samples: list[SampleSpec | None] = []
        prompt_logprobs, pools = [], []
        for index, entry in enumerate(self.entries):
            sequence, table, start, num_tokens, is_sampled, num_prompt_logprobs, placeholder_row = entry
            seq_ids.append(sequence.seq_id)
            query_lens.append(num_tokens)
            context_lens.append(start)
            if placeholder_row is None:
                token_ids.extend(sequence.token_ids[start : start + num_tokens])
            else:
                token_ids.append(-1 - placeholder_row)
            tables.append(table.tobytes())
            tables.append(_UNUSED * (max_blocks - len(table)))
            is_pooled = sequence.params.pooling is not None
            if is_pooled:
                pools.append(_pool_spec(index, entry))
            samples.append(sequence.sample_spec(start + num_tokens) if is_sampled and not is_pooled else None)
            if num_prompt_logprobs:
                prompt_logprobs.append(_prompt_logprobs_spec(index, entry))
        return StepPlan(
            epoch=epoch,
            step=step,
            seq_ids=seq_ids,
            query_lens=query_lens.tobytes(),
            context_lens=context_lens.tobytes(),
            token_ids=token_ids.tobytes(),
            block_tables=b"".join(tables),
            max_blocks=max_blocks,
            samples=samples,
            prompt_logprobs=prompt_logprobs,
            pools=pools,
            placeholder_step=step - self.placeholder_steps_back if self.placeholder_steps_back else -1,
        )


def _pool_spec(index: int, entry: ScheduledSequence) -> PoolSpec:
    pooling = entry.sequence.params.pooling
    assert pooling is not None
    return PoolSpec(index, pooling.pooling, pooling.normalize, pooling.dimensions or 0, is_whole=entry.is_sampled)


def _prompt_logprobs_spec(index: int, entry: ScheduledSequence) -> PromptLogprobsSpec:
    sequence, first = entry.sequence, entry.start + 1
    assert sequence.params.prompt_logprobs is not None
    target_ids = sequence.token_ids[first : first + entry.num_prompt_logprobs].tobytes()
    return PromptLogprobsSpec(index, target_ids, sequence.params.prompt_logprobs)

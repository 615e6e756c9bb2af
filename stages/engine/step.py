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

    @property
    def is_pooled(self) -> bool:
        return self.sequence.params.pooling is not None

    def token_ids(self) -> bytes:
        """int32, as in StepPlan."""
        if self.placeholder_row is not None:
            return array("i", [-1 - self.placeholder_row]).tobytes()
        return self.sequence.token_ids[self.start : self.start + self.num_tokens].tobytes()

    def sample_spec(self) -> SampleSpec | None:
        if not self.is_sampled or self.is_pooled:
            return None
        return self.sequence.sample_spec(self.start + self.num_tokens)


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
            (self.pooled if entry.is_pooled else self.sampled).append(entry.sequence)

    @property
    def has_decodes(self) -> bool:
        """Whether it computes sampled tokens."""
        return any(entry.start >= entry.sequence.num_prompt_tokens for entry in self.entries)

    def to_plan(self, epoch: int, step: int) -> StepPlan:
        entries = self.entries
        tables = [entry.block_table for entry in entries]
        max_blocks = max(map(len, tables))
        return StepPlan(
            epoch=epoch,
            step=step,
            seq_ids=[entry.sequence.seq_id for entry in entries],
            query_lens=array("i", [entry.num_tokens for entry in entries]).tobytes(),
            context_lens=array("i", [entry.start for entry in entries]).tobytes(),
            token_ids=b"".join([entry.token_ids() for entry in entries]),
            block_tables=b"".join([table.tobytes() + _UNUSED * (max_blocks - len(table)) for table in tables]),
            max_blocks=max_blocks,
            samples=[entry.sample_spec() for entry in entries],
            prompt_logprobs=[
                _prompt_logprobs_spec(i, entry) for i, entry in enumerate(entries) if entry.num_prompt_logprobs
            ],
            pools=[_pool_spec(i, entry) for i, entry in enumerate(entries) if entry.is_pooled],
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

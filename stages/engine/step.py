"""One step as the scheduler composed it, and the plan that tells the workers of it."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from stagemesh.stages.engine.sequence import Sequence
from stagemesh.stages.messages.step import PoolSpec, PromptLogprobsSpec, SampleSpec, StepPlan

_UNUSED = array("i", [-1]).tobytes()


class ScheduledSequence(NamedTuple):
    """What one step computes of one sequence: tokens [start, start + num_tokens)."""

    sequence: Sequence
    block_table: array[int]
    """A copy of the sequence's, as far as this step reaches: its own grows on, and goes when it is preempted."""
    start: int
    num_tokens: int
    is_sampled: bool
    """The step reaches the last known token or the one after it, so that it samples the next."""
    num_prompt_logprobs: int
    """Tokens that follow one of these in the prompt and whose log-probabilities are wanted."""
    placeholder_row: int | None
    """Not None: its only token is the one of this number among those that the step's feeder samples."""


class ScheduledStep:
    """One step as scheduled. `to_plan` may be called at any later time and gives the same plan."""

    __slots__ = ("entries", "placeholder_steps_back", "num_tokens")

    def __init__(self) -> None:
        self.entries: list[ScheduledSequence] = []
        self.num_tokens = 0
        self.placeholder_steps_back = 0
        """The step that samples what this one does not know is as many steps back; 0 where all is known."""

    @property
    def has_decodes(self) -> bool:
        """Whether it computes tokens that were sampled before it."""
        return any(entry.start >= entry.sequence.num_prompt_tokens for entry in self.entries)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that it samples a token for, in plan order."""
        return [entry.sequence for entry in self.entries if entry.is_sampled and entry.sequence.params.pooling is None]

    def to_plan(self, epoch: int, step: int) -> StepPlan:
        max_blocks = max(len(entry.block_table) for entry in self.entries)
        seq_ids: list[int] = []
        query_lens, context_lens, token_ids = array("i"), array("i"), array("i")
        tables: list[bytes] = []
        samples: list[SampleSpec | None] = []
        prompt_logprobs, pools = [], []
        for sequence, table, start, num_tokens, is_sampled, num_prompt_logprobs, placeholder_row in self.entries:
            end = start + num_tokens
            seq_ids.append(sequence.seq_id)
            query_lens.append(num_tokens)
            context_lens.append(start)
            if placeholder_row is None:
                token_ids.extend(sequence.token_ids[start:end])
            else:
                token_ids.append(-1 - placeholder_row)
            tables.append(table.tobytes())
            tables.append(_UNUSED * (max_blocks - len(table)))
            pooling = sequence.params.pooling
            if pooling is not None:
                wanted = (pooling.pooling, pooling.normalize, pooling.dimensions or 0)
                pools.append(PoolSpec(len(samples), *wanted, is_whole=is_sampled))
            samples.append(sequence.sample_spec(end) if is_sampled and pooling is None else None)
            if num_prompt_logprobs:
                targets = sequence.token_ids[start + 1 : start + 1 + num_prompt_logprobs].tobytes()
                assert sequence.params.prompt_logprobs is not None
                prompt_logprobs.append(PromptLogprobsSpec(len(samples) - 1, targets, sequence.params.prompt_logprobs))
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

"""Small random checkpoints, and lanes of ModelRunners without processes: TP ranks are threads, stages take
turns.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.stages.layers.tensor_parallel import SingleRank
from stagemesh.stages.messages.step import SampleSpec, StepPlan, StepResult
from stagemesh.stages.worker.model_runner import ModelRunner

torch.set_num_threads(1)  # several ranks are threads of one process here
TOLERANCE = 1e-4
"""Of float32 logits against transformers."""
LAYOUTS: list[tuple[int, tuple[int, ...] | None]] = [(1, None), (2, None), (1, (2, 1)), (2, (2, 1))]
"""(tp, layers per stage) for the 3 layers of make_checkpoint, which 2 stages do not divide."""
GREEDY = SampleSpec(0.0, 1.0, 0, 0.0, 0, 0, [])


def make_checkpoint(folder: Path, family: str = "Llama", *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A Hugging Face folder of a small model of `family` ("Llama", "Qwen3Moe") with random float32 weights."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **changes,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights spread around 1; every bias and matrix large enough to leave a trace in the logits.
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@lru_cache(maxsize=8)
def _reference(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def reference_logits(folder: Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, vocab] of the whole sequence at once, by transformers. What a folder holds must not change in between."""
    with torch.inference_mode():
        logits: Tensor = _reference(folder, dtype)(torch.tensor([list(token_ids)])).logits[0]
    return logits


@lru_cache
def reference_greedy(folder: Path, token_ids: tuple[int, ...], count: int) -> list[int]:
    """The next `count` tokens by transformers, each from the whole sequence at once."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(reference_logits(folder, ids)[-1].argmax()))
    return ids[len(token_ids) :]


@dataclass
class Part:
    """What one sequence does in a step."""

    token_ids: Sequence[int]
    context_len: int
    block_table: Sequence[int]
    sample: SampleSpec | None = GREEDY


def make_plan(*parts: Part, step: int = 0) -> StepPlan:
    width = max(len(part.block_table) for part in parts)
    tables = np.full((len(parts), width), -1, np.int32)
    for row, part in zip(tables, parts, strict=True):
        row[: len(part.block_table)] = part.block_table
    return StepPlan(
        epoch=1,
        step=step,
        seq_ids=list(range(len(parts))),
        query_lens=_int32([len(part.token_ids) for part in parts]),
        context_lens=_int32([part.context_len for part in parts]),
        token_ids=_int32([token for part in parts for token in part.token_ids]),
        block_tables=tables.tobytes(),
        max_blocks=width,
        samples=[part.sample for part in parts],
    )


def _int32(values: Sequence[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


@dataclass
class ThreadGroup:
    """A TensorGroup whose ranks are threads of one process."""

    rank: int
    size: int
    slots: list[Tensor | None]
    barrier: threading.Barrier

    @staticmethod
    def make(size: int) -> list[ThreadGroup]:
        slots: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size)
        return [ThreadGroup(rank, size, slots, barrier) for rank in range(size)]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x
        self.barrier.wait(timeout=60)
        everyone = [slot for slot in self.slots if slot is not None]
        self.barrier.wait(timeout=60)
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchange(x), dim)

    def gather_to_rank0(self, x: Tensor, dim: int) -> Tensor | None:
        everyone = self._exchange(x)
        return torch.cat(everyone, dim) if self.rank == 0 else None

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        assert sum(send_rows) == len(x)
        ends = [sum(send_rows[: rank + 1]) for rank in range(self.size)]
        everyone, all_ends = self._exchange(x), self._exchange(torch.tensor(ends))
        parts = [other.tensor_split(e.tolist())[self.rank] for other, e in zip(everyone, all_ends, strict=True)]
        assert [len(part) for part in parts] == list(receive_rows)
        return torch.cat(parts)


@dataclass
class ThreadLane:
    """All ranks of a lane, loaded and with a cache of `num_blocks` blocks."""

    folder: Path
    tp: int = 1
    partition: Sequence[int] | None = None
    """Layers per stage; None = one stage."""
    num_blocks: int = 64
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = EngineConfig.resolve(
            EngineArgs(
                model=str(self.folder),
                device="cpu",
                tensor_parallel_size=self.tp,
                pipeline_parallel_size=len(self.partition) if self.partition else 1,
                pipeline_layer_partition=self.partition,
                **{"dtype": "float32", "block_size": 4, **self.args},
            )
        )
        self.stages = [
            [ModelRunner(self.config, stage, rank, torch.device("cpu")) for rank in range(self.tp)]
            for stage in range(self.config.plan.pp_size)
        ]
        for ranks in self.stages:
            groups = ThreadGroup.make(self.tp) if self.tp > 1 else [SingleRank()]
            for runner, group in zip(ranks, groups, strict=True):
                runner.load()
                runner.allocate_kv(self.num_blocks)
                runner.set_group(group)

    def logits(self, *parts: Part) -> Tensor:
        """Run one step; logits of all its tokens [T, vocab]."""
        plan = make_plan(*parts)
        hidden = self._forward(plan)
        everyone = self._on_ranks(self.stages[-1], lambda r, runner: runner.logits(plan, hidden[r], rows="all"))
        assert all(result is None for result in everyone[1:])
        logits: Tensor = everyone[0]
        return logits

    def sample(self, *parts: Part) -> list[int]:
        return self.run(make_plan(*parts)).token_ids

    def run(self, plan: StepPlan) -> StepResult:
        hidden = self._forward(plan)
        everyone = self._on_ranks(self.stages[-1], lambda r, runner: runner.sample(plan, hidden[r]))
        assert all(result is None for result in everyone[1:])
        result: StepResult = everyone[0]
        return result

    def _forward(self, plan: StepPlan) -> list[Tensor]:
        hidden: list[Any] = [None] * self.tp
        for ranks in self.stages:
            hidden = self._on_ranks(ranks, lambda r, runner, x=hidden: runner.execute(plan, x[r]))
        return hidden

    def _on_ranks(self, ranks: list[ModelRunner], call: Any) -> list[Any]:
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(call, range(len(ranks)), ranks))


def some_token_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 101, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def check_against_transformers(folder: Path, tp: int, partition: tuple[int, ...] | None, **args: Any) -> None:
    """Logits of prefill, chunks, decode and a prefix that another sequence computed, and greedy answers to each."""
    lane = ThreadLane(folder, tp=tp, partition=partition, args=args)
    ids = some_token_ids(37, seed=1)
    expected = reference_logits(folder, ids)
    table = torch.randperm(64, generator=torch.Generator().manual_seed(2)).tolist()

    assert_same_logits(lane.logits(Part(ids, 0, table[:10])), expected)

    start = 0
    for length in (7, 1, 20, 1, 1, 7):
        assert_same_logits(
            lane.logits(Part(ids[start : start + length], start, table[10:20])), expected[start : start + length]
        )
        start += length

    shared, other = ids[:16], some_token_ids(9, seed=3)
    ours = lane.logits(Part(other, 16, table[:4] + table[20:23]), Part(ids[36:], 36, table[10:20]))
    assert_same_logits(ours, torch.cat((reference_logits(folder, shared + other)[16:], expected[36:])))

    # The same answer to ids[:20] as one prompt, in chunks, and behind a prefix that is cached; then all in one step.
    ways = [(0, (20,), table[24:32]), (0, (7, 1, 12), table[32:40]), (16, (4,), table[:4] + table[40:44])]
    answers: list[list[int]] = []
    for start, lengths, blocks in ways:
        for length in lengths:
            token_ids = lane.sample(Part(ids[start : start + length], start, blocks))
            start += length
        answers.append(token_ids)
    for context in range(20, 31):
        parts = [Part(answer[-1:], context, blocks) for answer, (_, _, blocks) in zip(answers, ways, strict=True)]
        for answer, token_id in zip(answers, lane.sample(*parts), strict=True):
            answer.append(token_id)
    assert answers == [reference_greedy(folder, tuple(ids[:20]), 12)] * 3

"""Scheduler and sampler around a toy model: logits that are a fixed function of the last few tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.engine.grammar import Grammar
from stagemesh.stages.engine.scheduler import Scheduler
from stagemesh.stages.messages.request import TokenDelta
from stagemesh.stages.messages.step import SampleSpec, StepResult, TokenLogprobs
from stagemesh.stages.worker.sampler import sample, token_logprobs


def toy_logits(tokens: Sequence[int], vocab_size: int) -> Tensor:
    """float32 [vocab_size]; depends on the last three tokens."""
    seed = 0
    for token_id in tokens[-3:]:
        seed = (seed * 1_000_003 + token_id + 1) % 2**31
    return 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None

    def take(self, delta: TokenDelta) -> None:
        assert delta.offset == len(self.token_ids)
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason
        self.error = delta.error
        self.logprobs += delta.logprobs or []
        if delta.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "the prompt is reported once"
            self.prompt_logprobs = delta.prompt_logprobs


class ToyLane:
    """Runs requests to their end. `disturb(step)` is called before each step, for whatever may go wrong there."""

    def __init__(self, vocab_size: int, *, eos_token_id: int, **changes: Any) -> None:
        self.vocab_size = vocab_size
        settings = {
            "num_blocks": 4096,
            "block_size": 4,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 512,
            "max_model_len": 1024,
            "num_micro_batches": 1,
            "eos_token_ids": [eos_token_id],
            "enable_prefix_caching": True,
        }
        self.scheduler = Scheduler(**(settings | changes))
        self.answers: dict[str, Answer] = {}

    def add(self, name: str, prompt: list[int], params: SamplingParams, grammar: Grammar | None = None) -> None:
        self.answers[name] = Answer()
        self.scheduler.add_request(name, prompt, params, grammar)

    def run(self, disturb: Callable[[int], None] = lambda step: None) -> dict[str, Answer]:
        num_steps = 0
        while self.scheduler.has_work:
            disturb(num_steps)
            self._step(num_steps)
            num_steps += 1
            assert num_steps < 20_000
        return self.answers

    def _step(self, number: int) -> None:
        step = self.scheduler.schedule()
        assert step is not None
        plan = step.to_plan(0, number)
        rows, specs = [], []
        for entry, spec in zip(step.entries, plan.samples, strict=True):
            if spec is not None:
                rows.append(toy_logits(entry.sequence.token_ids[: spec.position], self.vocab_size))
                specs.append(spec)
        logits = torch.stack(rows) if rows else torch.empty(0, self.vocab_size)
        token_ids = sample(logits.clone(), specs)
        reports = [
            token_logprobs(logits[i : i + 1], token_ids[i : i + 1], [spec.num_logprobs])[0]
            if spec.num_logprobs is not None
            else None
            for i, spec in enumerate(specs)
        ]
        prompt_reports = []
        for prompt_spec in plan.prompt_logprobs:
            entry = step.entries[prompt_spec.sequence]
            targets = torch.frombuffer(bytearray(prompt_spec.target_ids), dtype=torch.int32).tolist()
            report = []
            for i, target in enumerate(targets):
                row = toy_logits(entry.sequence.token_ids[: entry.start + i + 1], self.vocab_size)
                report += token_logprobs(row[None], [target], [prompt_spec.num_logprobs])
            prompt_reports.append(report)
        result = StepResult(0, number, token_ids, reports, prompt_reports)
        for delta in self.scheduler.process_result(step, result):
            self.answers[delta.request_id].take(delta)


def answer_alone(lane: ToyLane, prompt: list[int], params: SamplingParams, grammar: Grammar | None = None) -> Answer:
    lane.add("alone", prompt, params, grammar)
    return lane.run()["alone"]


def spec_of(lane: ToyLane) -> SampleSpec:
    """Of the only sequence of the next step, which is then given up."""
    step = lane.scheduler.schedule()
    assert step is not None
    (spec,) = step.to_plan(0, 0).samples
    assert spec is not None
    return spec


def ints(*values: int) -> bytes:
    """As messages carry integers."""
    return array("i", values).tobytes()

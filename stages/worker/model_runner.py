"""One rank's part of the model: loads it, runs step plans through it, samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stagemesh.config.capacity import gpu_kv_budget, kv_bytes_per_token
from stagemesh.config.engine import EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.memory import gib, host_memory_available
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.linear import LinearMethodFactory
from stagemesh.stages.layers.moe import MoE
from stagemesh.stages.layers.quantized_linear import linear_methods
from stagemesh.stages.layers.rotary import RotaryTable
from stagemesh.stages.layers.tensor_parallel import TensorGroup, TensorShard
from stagemesh.stages.messages.step import StepPlan, StepResult, TokenLogprobs
from stagemesh.stages.models.decoder import Decoder
from stagemesh.stages.worker.batch_builder import BatchBuilder
from stagemesh.stages.worker.kv_cache import make_kv_cache
from stagemesh.stages.worker.pooler import Pooler
from stagemesh.stages.worker.sampler import sample, token_logprobs

logger = logging.getLogger(__name__)

PROMPT_LOGPROBS_ROWS = 128
"""Prompt tokens whose logits are in memory at a time."""


class ModelRunner:
    """Life: `load`, `allocate_kv`, `set_group` (in each epoch), then for every plan `execute`, and `sample` on the last
    stage. One caller at a time.
    """

    def __init__(
        self,
        config: EngineConfig,
        stage: int,
        tp_rank: int,
        device: torch.device,
        make_method: LinearMethodFactory | None = None,
    ) -> None:
        """make_method: by default that of the config's quantization."""
        self._config = config
        self._make_method = make_method or linear_methods(config.quantization)
        self._device = device
        self._dtype = getattr(torch, config.dtype)
        self._kv_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self._dtype
        self._stage = stage
        self._tp = TensorShard(tp_rank, config.plan.tp_size)
        self._block_size = config.block_size
        self._model: Decoder | None = None
        self._cache: list[Tensor] | None = None
        self._batches: BatchBuilder | None = None
        self._pooler = Pooler()
        self._moe_layers: list[MoE] = []
        self._expert_tokens: Tensor | None = None

    # -- before the first step ---------------------------------------------------------------------------

    @torch.inference_mode()
    def load(self) -> None:
        """Read this rank's weights; ConfigError names what does not fit the model."""
        config, model_config = self._config, self._config.model
        layers, expert_parallel = config.plan.layer_ranges[self._stage], config.plan.expert_parallel
        model = Decoder(model_config, layers, self._tp, self._make_method, expert_parallel=expert_parallel)
        with Checkpoint(config.local_model_path(), self._dtype, self._device) as checkpoint:
            unused = model.load(checkpoint)
        if unused and self._tp.rank == 0:
            logger.warning("%d tensors of the checkpoint are not used: %s", len(unused), ", ".join(unused[:10]))
        kv_factor, num_kv_heads, block_size, head_dim = model.kv_block_shape(self._block_size)
        rotary = RotaryTable(
            model_config.rope, model_config.rotary_dim, config.max_model_len, self._dtype, self._device
        )
        num_heads = model_config.num_heads // self._tp.size
        shape = (num_heads, num_kv_heads, block_size, head_dim)
        self._batches = BatchBuilder(rotary, *shape, self._dtype, self._device, model_config.sliding_window, kv_factor)
        self._model = model
        if self._tp.rank == 0:  # one rank counts for all
            self._moe_layers = list(model.mixtures.values())

    def kv_bytes_per_block(self) -> int:
        """Over the layers of this stage."""
        config = self._config
        return self._block_size * kv_bytes_per_token(config.model, config.plan, self._stage, config.kv_dtype_bytes)

    def max_kv_blocks(self) -> int:
        """As many as fit beside this rank's weights; ConfigError if not even one."""
        budget = self._config.kv_cache_memory_bytes
        if budget is None:
            budget = self._cuda_kv_budget()
        elif self._device.type == "cpu" and budget > (free := host_memory_available()):
            tokens = free // self.kv_bytes_per_block() * self._block_size
            reason = f"this machine has {gib(free)} left; max_model_len={tokens} would just fit"
            raise ConfigError("kv_cache_memory_bytes", budget, reason)
        blocks = budget // self.kv_bytes_per_block()
        if blocks < 1:
            raise ConfigError("kv_cache_memory_bytes", budget, "too little for a single block of KV cache")
        return blocks

    def _cuda_kv_budget(self) -> int:
        """Bytes that gpu_memory_utilization leaves beside the memory in use and the largest step."""
        free, total = torch.cuda.mem_get_info(self._device)
        activations = self._measure_activations()
        utilization = self._config.gpu_memory_utilization
        budget = gpu_kv_budget(total, utilization, total - free, activations)
        if budget < self.kv_bytes_per_block():
            reason = f"leaves no KV cache: weights and others use {total - free} bytes, a step {activations}"
            raise ConfigError("gpu_memory_utilization", utilization, reason)
        return budget

    def _measure_activations(self) -> int:
        """Peak bytes of the largest step, beside weights and cache."""
        num_tokens = self._config.max_num_batched_tokens
        plan = _widest_plan(num_tokens, self._config.max_model_len, self._block_size)
        model = self._loaded()
        self.allocate_kv(len(plan.block_tables) // 4)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        hidden = self.execute(plan, None if model.is_first else self.empty_hidden(num_tokens))
        if model.is_last:
            self.logits(plan, hidden[: self._config.max_num_seqs], rows="all")
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        self._cache = None
        self._expert_tokens = None
        torch.cuda.empty_cache()
        return peak

    def allocate_kv(self, num_blocks: int) -> None:
        """Replace the cache; its contents are lost."""
        model = self._loaded()
        self._cache = None  # frees its memory first
        shape = model.kv_block_shape(self._block_size)
        self._cache = make_kv_cache(len(model.layers), num_blocks, shape, self._kv_dtype, self._device)

    def set_group(self, group: TensorGroup) -> None:
        assert (group.rank, group.size) == (self._tp.rank, self._tp.size)
        self._tp.group = group

    # -- steps -------------------------------------------------------------------------------------------

    def empty_hidden(self, num_tokens: int) -> Tensor:
        """A buffer for activations: [num_tokens, hidden] in the model's dtype."""
        return torch.empty(num_tokens, self._config.model.hidden_size, dtype=self._dtype, device=self._device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, hidden: Tensor | None, sampled_token_ids: Sequence[int] = ()) -> Tensor:
        """Run the plan's T tokens through this stage: hidden states [T, hidden].

        hidden: what the stage before returned; None on the first. sampled_token_ids: of step `plan.placeholder_step`,
        on the first stage.
        """
        model = self._loaded()
        assert self._cache is not None and self._batches is not None, "allocate_kv() comes first"
        batch = self._batches.build(plan, sampled_token_ids)
        if hidden is None:
            hidden = model.embed(batch.token_ids)
        hidden = model.forward(hidden, batch, self._cache)
        if self._moe_layers:
            tokens = torch.stack([layer.tokens_per_expert for layer in self._moe_layers]).sum(0)
            self._expert_tokens = tokens if self._expert_tokens is None else self._expert_tokens + tokens
        return hidden

    @torch.inference_mode()
    def sample(self, plan: StepPlan, hidden: Tensor) -> StepResult | None:
        """Last stage: `hidden` is what `execute` returned. None on tp ranks but 0, which must call it too."""
        result = StepResult(plan.epoch, plan.step, [])
        if plan.prompt_logprobs:
            result.prompt_logprobs = self._prompt_logprobs(plan, hidden)
        if plan.pools and self._tp.rank == 0:
            norm = self._loaded().norm
            assert norm is not None
            result.pooled = self._pooler.pool(plan, hidden, norm)
        specs = [spec for spec in plan.samples if spec is not None]
        logits = self.logits(plan, hidden) if specs else None
        if logits is not None:
            counts = {row: spec.num_logprobs for row, spec in enumerate(specs) if spec.num_logprobs is not None}
            unadjusted = logits[list(counts)] if counts else None
            result.token_ids = sample(logits, specs)
            if unadjusted is not None:
                token_ids = [result.token_ids[row] for row in counts]
                named = [specs[row].logprob_token_ids for row in counts]
                logprobs = token_logprobs(unadjusted, token_ids, list(counts.values()), named)
                by_row = dict(zip(counts, logprobs, strict=True))
                result.logprobs = [by_row.get(row) for row in range(len(specs))]
        return result if self._tp.rank == 0 else None

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor) -> list[list[TokenLogprobs]]:
        ends = np.cumsum(np.frombuffer(plan.query_lens, np.int32))
        starts = ends - np.frombuffer(plan.query_lens, np.int32)
        reports = []
        for spec in plan.prompt_logprobs:
            start = int(starts[spec.sequence])
            targets = np.frombuffer(spec.target_ids, np.int32).tolist()
            report: list[TokenLogprobs] = []
            for first in range(0, len(targets), PROMPT_LOGPROBS_ROWS):
                part = targets[first : first + PROMPT_LOGPROBS_ROWS]
                logits = self._loaded().logits(hidden[start + first : start + first + len(part)])
                if logits is not None:
                    entries = token_logprobs(logits, part, [spec.num_logprobs] * len(part))
                    report += [entry for entry in entries if entry is not None]  # all: a prompt holds no -1
            reports.append(report)
        return reports

    @torch.inference_mode()
    def logits(self, plan: StepPlan, hidden: Tensor, rows: Literal["sampled", "all"] = "sampled") -> Tensor | None:
        """Last stage, tp rank 0: [n, vocab_size] for the last token of each sampled sequence or for all T tokens."""
        if rows == "sampled":
            last = np.cumsum(np.frombuffer(plan.query_lens, np.int32)) - 1
            sampled = last[[spec is not None for spec in plan.samples]]
            if len(sampled) < len(hidden):
                hidden = hidden[torch.from_numpy(sampled).to(self._device)]
        return self._loaded().logits(hidden)

    def expert_load(self) -> dict[int, list[int]]:
        """Layer → tokens of each expert in the last step; the same on every rank of the stage."""
        return {layer: moe.tokens_per_expert.tolist() for layer, moe in self._loaded().mixtures.items()}

    def take_expert_tokens(self) -> list[int]:
        """Tokens of each expert since the last call, summed over layers. Waits for the device.

        Empty on tp ranks but 0, and in a dense model.
        """
        tokens, self._expert_tokens = self._expert_tokens, None
        return [] if tokens is None else tokens.tolist()

    def _loaded(self) -> Decoder:
        assert self._model is not None, "load() comes first"
        return self._model


def _widest_plan(num_tokens: int, max_model_len: int, block_size: int) -> StepPlan:
    """A prefill in as few sequences as fit, nothing sampled."""
    query_lens = np.full(-(-num_tokens // max_model_len), max_model_len, np.int32)
    query_lens[-1] = num_tokens - query_lens[:-1].sum()
    width = -(-int(query_lens.max()) // block_size)
    return StepPlan(
        epoch=0,
        step=0,
        seq_ids=list(range(len(query_lens))),
        query_lens=query_lens.tobytes(),
        context_lens=np.zeros_like(query_lens).tobytes(),
        token_ids=np.zeros(num_tokens, np.int32).tobytes(),
        block_tables=np.arange(len(query_lens) * width, dtype=np.int32).tobytes(),
        max_blocks=width,
        samples=[None] * len(query_lens),
    )

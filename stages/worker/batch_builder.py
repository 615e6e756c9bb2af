"""Step plans → batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from stagemesh.kernels.paged_attention import Ints, PagedAttentionStep
from stagemesh.kernels.paged_attention_cpu import CpuPagedAttention
from stagemesh.stages.layers.forward_batch import Attend, ForwardBatch
from stagemesh.stages.layers.rotary import RotaryTable
from stagemesh.stages.messages.step import StepPlan


class BatchBuilder:
    """Owns the attention workspace, so one batch is alive at a time."""

    def __init__(
        self,
        rotary: RotaryTable,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        sliding_window: int | None = None,
        kv_factor: int = 2,
    ) -> None:
        self._rotary = rotary
        self._block_size = block_size
        self._device = device
        self._prepare: Callable[[Ints, Ints, Ints, Ints], Attend]
        if device.type == "cpu":
            shape = (num_heads, num_kv_heads, block_size, head_dim)
            self._prepare = CpuPagedAttention(*shape, dtype, sliding_window, kv_factor).prepare
        else:
            self._prepare = partial(PagedAttentionStep.on_device, device=device, sliding_window=sliding_window)

    def build(self, plan: StepPlan, sampled_token_ids: Sequence[int] = ()) -> ForwardBatch:
        """sampled_token_ids: of step `plan.placeholder_step`, -1 where there is none: that sequence's part of this step
        is wasted work, on any token."""
        query_lens = np.frombuffer(plan.query_lens, np.int32)
        context_lens = np.frombuffer(plan.context_lens, np.int32)
        token_ids = np.frombuffer(plan.token_ids, np.int32)
        if sampled_token_ids:
            is_placeholder = token_ids < 0
            token_ids = token_ids.copy()
            sampled = np.maximum(np.array(sampled_token_ids, np.int32), 0)
            token_ids[is_placeholder] = sampled[-1 - token_ids[is_placeholder]]
        block_tables = np.frombuffer(plan.block_tables, np.int32).reshape(len(query_lens), plan.max_blocks)

        sequence_of: Ints = np.arange(len(query_lens))
        positions: Ints = context_lens
        if len(token_ids) > len(query_lens):
            starts = np.cumsum(query_lens) - query_lens
            sequence_of = sequence_of.repeat(query_lens)
            positions = np.arange(len(token_ids)) + (context_lens - starts)[sequence_of]
        block_index, offsets = np.divmod(positions, self._block_size)
        slots = block_tables[sequence_of, block_index] * np.int64(self._block_size) + offsets

        cos, sin = self._rotary.at(torch.from_numpy(positions.astype(np.int64)).to(self._device))
        attend = self._prepare(query_lens, context_lens, block_tables, slots)
        return ForwardBatch(torch.from_numpy(token_ids.astype(np.int64)).to(self._device), cos, sin, attend)

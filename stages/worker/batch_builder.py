"""Step plans → batches on the device: token ids, rotary angles, KV slots and block tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stagemesh.kernels.paged_attention import Ints, PagedAttentionStep
from stagemesh.kernels.paged_attention_cpu import CpuPagedAttention
from stagemesh.stages.layers.forward_batch import ForwardBatch
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
        self._sliding_window = sliding_window
        shape = (num_heads, num_kv_heads, block_size, head_dim)
        self._cpu = CpuPagedAttention(*shape, dtype, sliding_window, kv_factor) if device.type == "cpu" else None

    def build(self, plan: StepPlan, sampled_token_ids: Sequence[int] = ()) -> ForwardBatch:
        """sampled_token_ids: what step `plan.placeholder_step` sampled, for the placeholders."""
        query_lens = np.frombuffer(plan.query_lens, np.int32)
        context_lens = np.frombuffer(plan.context_lens, np.int32)
        token_ids = np.frombuffer(plan.token_ids, np.int32)
        if sampled_token_ids:
            is_placeholder = token_ids < 0
            token_ids = token_ids.copy()
            token_ids[is_placeholder] = np.array(sampled_token_ids, np.int32)[-1 - token_ids[is_placeholder]]
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
        step = (query_lens, context_lens, block_tables, slots)
        attend = (
            self._cpu.prepare(*step)
            if self._cpu
            else PagedAttentionStep.on_device(*step, self._device, self._sliding_window)
        )
        return ForwardBatch(torch.from_numpy(token_ids.astype(np.int64)).to(self._device), cos, sin, attend)

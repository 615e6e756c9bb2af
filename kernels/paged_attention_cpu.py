"""Paged attention on a CPU: index arithmetic once per step, then few large calls per layer.

`CpuPagedAttention.prepare` makes the `CpuAttentionStep` that every layer calls with its own cache. Keys and values are
gathered into dense matrices; scores and output are one batched product each, with the G query heads of a KV head as
rows. Scores are rounded to the model's dtype; the softmax is computed in float32.

- Decode (one query token): sequences of similar length go together, padded to a common number of blocks.
- Prefill chunk: one sequence at a time, in tiles of queries. A tile sees the keys up to its own end, so only the square
  at its end needs a mask.

A mask hides no NaN (-inf + NaN and 0 · NaN are NaN), so what a decoding sequence gathers is its own alone: its last
block again where it is shorter than its group, and zeros behind its end: the step that begins a block clears it first.
What an earlier owner of the block computed does not matter.

Measured as in README.md: prefill of 512 tokens 3.9 ms per layer, `scaled_dot_product_attention` 8.2 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagemesh.kernels.paged_attention import Ints
from stagemesh.kernels.quant_w8a8 import fp8_values
from stagemesh.kernels.store_kv import clear_blocks, slot_rows, store_kv_rows

MAX_GROUP_BYTES = 8 << 20
"""Keys and values gathered at once for decoding; fits the CPU's cache."""
MAX_SCORE_BYTES = 4 << 20
"""Scores of one tile, likewise."""
MIN_TILE, MAX_TILE = 32, 128
"""Query tokens in a tile."""


@dataclass(frozen=True, slots=True)
class _Gather:
    """Blocks gathered in the workspace."""

    rows: Tensor
    """int64 [n]: rows of the cache seen as [N·2·K, B·D]."""
    out: Tensor
    """[n, B·D], a view of the workspace; `key` [S·K, D, L] and `value` [S·K, L, D] view the same."""
    key: Tensor
    value: Tensor

    def __call__(self, cache: Tensor) -> None:
        blocks = cache.view(-1, self.out.shape[1])
        # Into memory that all layers reuse: a fresh allocation of this size costs more in page faults than
        # the gather itself (measured: 3.6 ms against 0.2 ms for 6 MB).
        if blocks.dtype == self.out.dtype:
            torch.index_select(blocks, 0, self.rows, out=self.out)
        else:
            chosen = torch.index_select(blocks.view(torch.uint8), 0, self.rows)
            self.out.copy_(fp8_values(chosen.view(blocks.dtype), self.out.dtype))


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """S sequences with one query token each, padded to L slots."""

    tokens: Tensor
    """int64 [S]: their place in the step."""
    gather: _Gather
    mask: Tensor
    """[S·K, 1, L]: 0 where visible, else -inf."""

    def __call__(self, q: Tensor, cache: Tensor, scale: float) -> Tensor:
        """q [S, H, D] → [S, H, D]."""
        self.gather(cache)
        queries = q.reshape(self.mask.shape[0], -1, q.shape[-1])  # [S·K, G, D]
        scores = torch.baddbmm(self.mask, queries, self.gather.key, alpha=scale)
        return torch.bmm(scores.softmax(-1), self.gather.value).view(q.shape)


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    """Tokens start..end of the step, of one sequence with `context_len` cached tokens."""

    start: int
    end: int
    context_len: int
    tile: int
    gather: _Gather
    mask: Tensor
    """[tile, 1, tile]: 0 on and below the diagonal, else -inf."""
    sliding_window: int | None

    def __call__(self, q: Tensor, cache: Tensor, scale: float) -> Tensor:
        """q [T, H, D] of the whole step → [end - start, H, D]."""
        self.gather(cache)
        num_kv_heads, head_dim, _ = self.gather.key.shape
        length = self.end - self.start
        queries = q[self.start : self.end].unflatten(1, (num_kv_heads, -1)).transpose(0, 1)  # [K, length, G, D]
        group = queries.shape[2]
        out = torch.empty(num_kv_heads, length, group, head_dim, dtype=q.dtype)
        for first in range(0, length, self.tile):
            last = min(first + self.tile, length)
            visible = self.context_len + last
            # Slots that have left the window when the tile begins; below 0, the queries until the first one leaves.
            # Each further query of the tile loses one more.
            gone = 0 if self.sliding_window is None else self.context_len + first + 1 - self.sliding_window
            oldest = max(0, gone)
            scores = torch.baddbmm(
                q.new_empty(1, 1, 1),  # not read: beta is 0
                queries[:, first:last].flatten(1, 2),
                self.gather.key[:, :, oldest:visible],
                beta=0,
                alpha=scale,
            )
            by_query = scores.view(num_kv_heads, last - first, group, visible - oldest)
            square = by_query[..., first - last :]
            square += self.mask[: last - first, :, : last - first]
            if self.sliding_window is not None and (losing := last - first - (oldest - gone)) > 0:
                corner = by_query[:, oldest - gone :, :, :losing]
                corner += self.mask.transpose(0, 2)[:losing, :, :losing]
            weighted = torch.bmm(scores.softmax(-1), self.gather.value[:, oldest:visible])
            out[:, first:last] = weighted.view(num_kv_heads, last - first, group, head_dim)
        return out.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class CpuAttentionStep:
    """Attention of one step; call it once per layer, before the next `prepare`."""

    store_rows: Tensor
    begun: Tensor | None
    """int64 [n]: rows of the cache seen as [N·2·K, B·D], of the last blocks that this step begins; None for none."""
    groups: list[_DecodeGroup]
    chunks: list[_PrefillChunk]

    def __call__(self, q: Tensor, kv: Tensor, cache: Tensor, scale: float) -> Tensor:
        """Store `kv` [T, 2·K, D]; attention of `q` [T, H, D], as [T, H·D]."""
        if self.begun is not None:
            clear_blocks(cache, self.begun)
        store_kv_rows(kv, cache, self.store_rows)
        if len(self.groups) == 1 and not self.chunks:
            # Most steps: every sequence decodes, all fit one group, and a lone group keeps the order of the step.
            return self.groups[0](q, cache, scale).flatten(1)
        out = torch.empty(q.shape, dtype=q.dtype)
        for group in self.groups:
            out.index_copy_(0, group.tokens, group(q.index_select(0, group.tokens), cache, scale))
        for chunk in self.chunks:
            out[chunk.start : chunk.end] = chunk(q, cache, scale)
        return out.flatten(1)


class CpuPagedAttention:
    """Prepares steps for caches [N, kv_factor, num_kv_heads, block_size, head_dim].

    Owns the workspace: only the step prepared last may be called, by one caller at a time.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        sliding_window: int | None = None,
        kv_factor: int = 2,
    ) -> None:
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._block_size = block_size
        self._head_dim = head_dim
        self._dtype = dtype
        self._sliding_window = sliding_window
        self._kv_factor = kv_factor
        self._kv_rows = np.arange(kv_factor * num_kv_heads)
        """Key heads, then value heads."""
        self._workspace = torch.empty(0, block_size * head_dim, dtype=dtype)
        self._mask = torch.full((MAX_TILE, MAX_TILE), float("-inf"), dtype=dtype).triu_(1)[:, None, :]
        bytes_per_block = kv_factor * num_kv_heads * block_size * head_dim * dtype.itemsize
        self._max_group_blocks = MAX_GROUP_BYTES // bytes_per_block

    def prepare(self, query_lens: Ints, context_lens: Ints, block_tables: Ints, slots: Ints) -> CpuAttentionStep:
        """query_lens, context_lens: [S]; block_tables: [S, max_blocks]; slots: int64 [T] as in store_kv."""
        if self._sliding_window is not None:
            context_lens, block_tables = self._drop_old_blocks(context_lens, block_tables, self._sliding_window)
        totals = context_lens + query_lens
        num_blocks = -(-totals // self._block_size)
        if len(slots) == len(query_lens):
            decodes, prefills = np.arange(len(slots)), np.arange(0)
        else:
            decodes, prefills = np.flatnonzero(query_lens == 1), np.flatnonzero(query_lens > 1)
        members = self._group_decodes(decodes, num_blocks)
        padded = [len(group) * int(num_blocks[group].max()) for group in members]
        self._grow(max([*padded, *num_blocks[prefills].tolist()]))

        ends = query_lens.cumsum()
        last_blocks = block_tables[np.arange(len(query_lens)), num_blocks - 1]
        groups = [
            self._decode_group(ends[s] - 1, totals[s], num_blocks[s], block_tables[s], last_blocks[s]) for s in members
        ]
        chunks = [
            self._prefill_chunk(int(ends[s]), int(query_lens[s]), int(context_lens[s]), block_tables[s])
            for s in prefills
        ]
        rows = slot_rows(torch.from_numpy(slots), len(self._kv_rows), self._block_size)
        begun = None
        # Of the last blocks only, because a step fills the others that it begins.
        if len(new := last_blocks[(num_blocks - 1) * self._block_size >= context_lens]):
            begun = torch.from_numpy((new[:, None].astype(np.int64) * len(self._kv_rows) + self._kv_rows).ravel())
        return CpuAttentionStep(rows, begun, groups, chunks)

    def _drop_old_blocks(self, context_lens: Ints, block_tables: Ints, sliding_window: int) -> tuple[Ints, Ints]:
        """Drop blocks that no query sees, as if the sequences began behind them."""
        dropped = np.maximum(context_lens + 1 - sliding_window, 0) // self._block_size
        columns = np.minimum(np.arange(block_tables.shape[1]) + dropped[:, None], block_tables.shape[1] - 1)
        return context_lens - dropped * self._block_size, np.take_along_axis(block_tables, columns, 1)

    def _group_decodes(self, sequences: Ints, num_blocks: Ints) -> list[Ints]:
        """Groups that fit MAX_GROUP_BYTES, with at most twice the work by padding."""
        if len(sequences) == 0:
            return []
        shortest, longest = int(num_blocks[sequences].min()), int(num_blocks[sequences].max())
        if longest <= 2 * shortest and len(sequences) * longest <= self._max_group_blocks:
            return [sequences]
        sequences = sequences[np.argsort(-num_blocks[sequences], kind="stable")]
        starts = [0]
        longest = int(num_blocks[sequences[0]])
        for i, length in enumerate(num_blocks[sequences].tolist()):
            too_large = (i + 1 - starts[-1]) * longest > self._max_group_blocks
            if i > starts[-1] and (too_large or 2 * length < longest):
                starts.append(i)
                longest = length
        return np.split(sequences, starts[1:])

    def _decode_group(
        self, tokens: Ints, totals: Ints, num_blocks: Ints, block_tables: Ints, last_blocks: Ints
    ) -> _DecodeGroup:
        width = int(num_blocks.max())
        # A shorter sequence reads its last block again; the mask hides it.
        tables = np.where(np.arange(width) < num_blocks[:, None], block_tables[:, :width], last_blocks[:, None])
        slots = np.arange(width * self._block_size)
        visible = slots < totals[:, None]
        if self._sliding_window is not None:
            visible &= slots >= totals[:, None] - self._sliding_window
        mask = np.where(visible, np.float32(0), -np.inf)
        masks = torch.from_numpy(mask.repeat(self._num_kv_heads, 0)).to(self._dtype)
        return _DecodeGroup(torch.from_numpy(tokens), self._gather(tables), masks[:, None])

    def _prefill_chunk(self, end: int, query_len: int, context_len: int, block_table: Ints) -> _PrefillChunk:
        total = context_len + query_len
        gather = self._gather(block_table[None, : -(-total // self._block_size)])
        tile = MAX_SCORE_BYTES // (self._num_heads * total * self._dtype.itemsize)
        tile = min(max(tile, MIN_TILE), MAX_TILE)
        return _PrefillChunk(end - query_len, end, context_len, tile, gather, self._mask, self._sliding_window)

    def _gather(self, tables: Ints) -> _Gather:
        """For tables [S, blocks]: keys of all sequences and heads, then values, head before block."""
        num_sequences, width = tables.shape
        first_rows = (tables.astype(np.int64) * len(self._kv_rows))[:, None, :]
        rows = first_rows + self._kv_rows.reshape(self._kv_factor, 1, -1, 1)
        out = self._workspace[: rows.size]
        kv = out.view(self._kv_factor, num_sequences * self._num_kv_heads, width * self._block_size, self._head_dim)
        return _Gather(torch.from_numpy(rows.ravel()), out, kv[0].transpose(1, 2), kv[-1])

    def _grow(self, num_blocks: int) -> None:
        rows = num_blocks * len(self._kv_rows)
        if rows > self._workspace.shape[0]:
            self._workspace = torch.empty(rows, self._block_size * self._head_dim, dtype=self._dtype)

"""Token embedding and output head, cut along the vocabulary.

Rank r of n owns rows [r·P, (r+1)·P), P = ceil(V / n); the last ranks may own fewer, or none.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding, pad

from stagemesh.kernels.linear import linear, pack_weight
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.tensor_parallel import TensorShard


class VocabParallel:
    """A matrix [V, hidden_size] cut by rows."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: TensorShard) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.tp = tp
        self.padded_rows = -(-vocab_size // tp.size)
        self.start = min(tp.rank * self.padded_rows, vocab_size)
        self.end = min(self.start + self.padded_rows, vocab_size)
        self.weight: Tensor

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """[P, hidden_size]: this rank's rows, then zeros."""
        rows = checkpoint.read(self.name, (self.vocab_size, self.hidden_size), (slice(self.start, self.end),))
        missing = self.padded_rows - len(rows)
        return pad(rows, (0, 0, 0, missing)) if missing else rows


class VocabParallelEmbedding(VocabParallel):
    def load(self, checkpoint: Checkpoint) -> None:
        self.weight = self.read(checkpoint)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] → [T, hidden_size], whole on every rank."""
        if self.tp.size == 1:
            return embedding(token_ids, self.weight)
        local = token_ids - self.start
        elsewhere = (local < 0) | (local >= self.end - self.start)
        rows = embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class VocabParallelHead(VocabParallel):
    """Hidden states to logits."""

    def load(self, checkpoint: Checkpoint, tied_to: VocabParallelEmbedding | None = None) -> None:
        """tied_to: this rank's embedding, where it holds the same weights."""
        self.weight = pack_weight(tied_to.weight if tied_to else self.read(checkpoint))

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """[n, hidden_size] → [n, vocab_size] on rank 0, None on others."""
        logits = linear(hidden, self.weight)
        if self.tp.size == 1:
            return logits
        whole = self.tp.group.gather_to_rank0(logits, 1)
        return None if whole is None else whole[:, : self.vocab_size]

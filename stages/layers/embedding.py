"""Token embedding and output head, cut along the vocabulary.

Rank r of n owns rows [r·P, (r+1)·P) of the vocabulary, P = ceil(V / n); the last ranks may own fewer, or
none. The embedding sums over ranks, the head's logits are gathered to rank 0 and cut to V.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding, pad

from stagemesh.kernels.linear import linear, pack_weight
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.tensor_parallel import TensorShard


class VocabShard:
    """The rows of the vocabulary that a rank owns."""

    def __init__(self, vocab_size: int, tp: TensorShard) -> None:
        self.vocab_size = vocab_size
        self.padded_rows = -(-vocab_size // tp.size)
        self.start = min(tp.rank * self.padded_rows, vocab_size)
        self.end = min(self.start + self.padded_rows, vocab_size)

    def read(self, checkpoint: Checkpoint, name: str, hidden_size: int) -> Tensor:
        """[P, hidden_size]: this rank's rows, zeros below them where the vocabulary has ended."""
        rows = checkpoint.read(name, (self.vocab_size, hidden_size), (slice(self.start, self.end),))
        missing = self.padded_rows - len(rows)
        return pad(rows, (0, 0, 0, missing)) if missing else rows


class VocabParallelEmbedding:
    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: TensorShard) -> None:
        self.name = name
        self.hidden_size = hidden_size
        self.tp = tp
        self.shard = VocabShard(vocab_size, tp)
        self.weight: Tensor

    def load(self, checkpoint: Checkpoint) -> None:
        self.weight = self.shard.read(checkpoint, self.name, self.hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] → [T, hidden_size], whole on every rank."""
        if self.tp.size == 1:
            return embedding(token_ids, self.weight)
        local = token_ids - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.end - self.shard.start)
        rows = embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class VocabParallelHead:
    """Hidden states to logits.

    A tied head is one that is read under the embedding's name. With several stages the last one needs its own
    copy anyway, and on a CPU the head keeps it in another layout.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: TensorShard) -> None:
        self.name = name
        self.hidden_size = hidden_size
        self.tp = tp
        self.shard = VocabShard(vocab_size, tp)
        self.weight: Tensor

    def load(self, checkpoint: Checkpoint, tied_to: VocabParallelEmbedding | None = None) -> None:
        """`tied_to`: this rank's own embedding, where it holds the same weights; then nothing is read again."""
        rows = tied_to.weight if tied_to else self.shard.read(checkpoint, self.name, self.hidden_size)
        self.weight = pack_weight(rows)

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """[n, hidden_size] → logits [n, vocab_size] on rank 0, None on the others."""
        logits = linear(hidden, self.weight)
        if self.tp.size == 1:
            return logits
        whole = self.tp.group.gather_to_rank0(logits, 1)
        return None if whole is None else whole[:, : self.shard.vocab_size]

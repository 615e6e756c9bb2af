"""A decoder-only language model, or one stage's layers of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import kv_heads
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from stagemesh.stages.layers.forward_batch import ForwardBatch
from stagemesh.stages.layers.linear import LinearMethodFactory, dense_method
from stagemesh.stages.layers.moe import MoE
from stagemesh.stages.layers.norm import RMSNorm
from stagemesh.stages.layers.tensor_parallel import TensorShard

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm"
HEAD = "lm_head.weight"

HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
"""Buffers in old checkpoints that implementations compute."""


class AttentionBlock(Protocol):
    def load(self, checkpoint: Checkpoint) -> None: ...

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: Tensor) -> Tensor: ...


class FeedForward(Protocol):
    def load(self, checkpoint: Checkpoint) -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class DecoderLayer(Protocol):
    """One layer, as a family makes it."""

    @property
    def feed_forward(self) -> FeedForward: ...

    def load(self, checkpoint: Checkpoint) -> None: ...

    def __call__(
        self, residual: Tensor, hidden_states: Tensor | None, batch: ForwardBatch, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(residual, hidden_states) → (residual, hidden_states), all [T, hidden]; the layer's output is their sum.

        They stay apart because add and norm are one kernel. `hidden_states` is None at the start of a stage.
        """


@dataclass(frozen=True, slots=True)
class PreNormLayer:
    """Norm, attention, add; norm, feed-forward, add."""

    input_norm: RMSNorm
    attention: AttentionBlock
    post_attention_norm: RMSNorm
    feed_forward: FeedForward

    def load(self, checkpoint: Checkpoint) -> None:
        for part in (self.input_norm, self.attention, self.post_attention_norm, self.feed_forward):
            part.load(checkpoint)

    def __call__(
        self, residual: Tensor, hidden_states: Tensor | None, batch: ForwardBatch, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        if hidden_states is None:
            normed = self.input_norm(residual)
        else:
            normed, residual = self.input_norm.add_and_norm(hidden_states, residual)
        hidden_states = self.attention(normed, batch, cache)
        normed, residual = self.post_attention_norm.add_and_norm(hidden_states, residual)
        return residual, self.feed_forward(normed)


class Decoder:
    """Layers [start, end) of a model, with the first the embedding, with the last norm and head. Filled by `load`."""

    def __init__(
        self,
        config: ModelConfig,
        layers: tuple[int, int],
        tp: TensorShard,
        make_method: LinearMethodFactory = dense_method,
        *,
        expert_parallel: bool = False,
    ) -> None:
        self.config = config
        self.expert_parallel = expert_parallel
        self.tp = tp
        self.make_method = make_method
        self.start, self.end = layers
        self.layers: list[DecoderLayer] = [config.family.decoder_layer(self, i) for i in range(self.start, self.end)]
        vocab = (config.vocab_size, config.hidden_size, tp)
        head_name = EMBEDDING if config.tie_word_embeddings else HEAD
        self.embedding = VocabParallelEmbedding(EMBEDDING, *vocab) if self.is_first else None
        self.norm = RMSNorm(NORM, config.hidden_size, config.rms_norm_eps) if self.is_last else None
        self.head = VocabParallelHead(head_name, *vocab) if self.is_last else None

    # -- the forward pass --------------------------------------------------------------------------------

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] → [T, hidden]; first stage only."""
        assert self.embedding is not None
        return self.embedding(token_ids)

    def forward(self, hidden: Tensor, batch: ForwardBatch, caches: list[Tensor]) -> Tensor:
        """The layers of this stage: [T, hidden] → [T, hidden]."""
        residual, hidden_states = hidden, None
        for layer, cache in zip(self.layers, caches, strict=True):
            residual, hidden_states = layer(residual, hidden_states, batch, cache)
        return residual if hidden_states is None else residual + hidden_states

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Last stage only: [n, hidden] → [n, vocab_size] on tp rank 0, None on the others."""
        assert self.norm is not None and self.head is not None
        return self.head(self.norm(hidden))

    # -- what this stage holds ---------------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.config.num_layers

    @property
    def mixtures(self) -> dict[int, MoE]:
        """By layer."""
        blocks = {index: layer.feed_forward for index, layer in enumerate(self.layers, self.start)}
        return {index: block for index, block in blocks.items() if isinstance(block, MoE)}

    def kv_block_shape(self, block_size: int) -> tuple[int, ...]:
        """Of one layer's block on this rank, as kernels/README.md describes it."""
        num_kv_heads = len(kv_heads(self.config, self.tp.size, self.tp.rank))
        return (self.config.kv_factor, num_kv_heads, block_size, self.config.head_dim)

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """Read this rank's weights; returns the tensors that no stage of the model uses."""
        if self.embedding:
            self.embedding.load(checkpoint)
        for layer in self.layers:
            layer.load(checkpoint)
        if self.norm and self.head:
            self.norm.load(checkpoint)
            self.head.load(checkpoint, self.embedding if self.config.tie_word_embeddings else None)
        return sorted(name for name in checkpoint.unread() if not self._is_elsewhere(name))

    def _is_elsewhere(self, name: str) -> bool:
        """Whether `name` belongs to another rank or stage, or does not matter."""
        moe, layer = self.config.moe, re.match(r"model\.layers\.(\d+)\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if layer and expert and moe and self.expert_parallel and int(layer[1]) in moe.layers:
            return int(expert[1]) < moe.num_experts
        if layer and not self.start <= int(layer[1]) < self.end:
            return int(layer[1]) < self.config.num_layers
        # A tied head is sometimes saved as well.
        return name in (EMBEDDING, f"{NORM}.weight", HEAD) or HARMLESS.search(name) is not None

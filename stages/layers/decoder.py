"""One decoder layer: attention and MLP, each behind a norm and added to the residual stream."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stagemesh.stages.batch import StepBatch
from stagemesh.stages.layers.norm import RMSNorm
from stagemesh.stages.weights import Checkpoint


class AttentionBlock(Protocol):
    def load(self, checkpoint: Checkpoint) -> None: ...

    def __call__(self, x: Tensor, batch: StepBatch, cache: Tensor) -> Tensor: ...


class FeedForward(Protocol):
    def load(self, checkpoint: Checkpoint) -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class DecoderLayer:
    """The residual stream and what is still to be added to it travel apart: add and norm are one kernel."""

    def __init__(
        self,
        input_norm: RMSNorm,
        attention: AttentionBlock,
        post_attention_norm: RMSNorm,
        feed_forward: FeedForward,
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_attention_norm = post_attention_norm
        self.feed_forward = feed_forward

    def load(self, checkpoint: Checkpoint) -> None:
        self.input_norm.load(checkpoint)
        self.attention.load(checkpoint)
        self.post_attention_norm.load(checkpoint)
        self.feed_forward.load(checkpoint)

    def __call__(self, stream: Tensor, update: Tensor | None, batch: StepBatch, cache: Tensor) -> tuple[Tensor, Tensor]:
        """(stream, update) → (stream, update), all [T, hidden]; the layer's output is their sum.

        `update` is None at the start of a stage, where nothing is left to be added.
        """
        if update is None:
            normed = self.input_norm(stream)
        else:
            normed, stream = self.input_norm.after_add(update, stream)
        update = self.attention(normed, batch, cache)
        normed, stream = self.post_attention_norm.after_add(update, stream)
        return stream, self.feed_forward(normed)

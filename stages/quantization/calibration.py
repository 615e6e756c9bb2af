"""The inputs of a model's linear layers on a text.

One decoder layer at a time runs over the whole text, as a pipeline stage; memory holds it and the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.kernels.linear import pack_weight
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.linear import DenseMethod, LinearMethod, WeightShard
from stagemesh.stages.messages.step import StepPlan
from stagemesh.stages.worker.model_runner import ModelRunner

BLOCK_SIZE = 16


class RecordingMethod:
    """Records statistics of a dense layer's inputs. No DenseMethod: Experts stack those."""

    def __init__(self) -> None:
        self.dense = DenseMethod()
        self.matrices: dict[str, Tensor] = {}
        """Float32 weights [out, in] by name."""
        self.num_tokens = 0
        self.largest = 0.0
        """Max of |x|."""
        self._moment: Tensor | None = None
        self._magnitude: Tensor | None = None

    def load(self, checkpoint: Checkpoint, parts: Sequence[WeightShard], with_bias: bool) -> None:
        self.dense.load(checkpoint, parts, with_bias)
        for part in parts:
            shape = (part.out_features, part.in_features)
            self.matrices[part.name] = checkpoint.read(f"{part.name}.weight", shape, dtype=torch.float32)

    def dequantize(self) -> Tensor:
        return self.dense.dequantize()

    def __call__(self, x: Tensor) -> Tensor:
        inputs = x.float()
        if not len(inputs):
            return self.dense(x)
        moment, magnitude = inputs.T @ inputs, inputs.abs().sum(0)
        self._moment = moment if self._moment is None else self._moment + moment
        self._magnitude = magnitude if self._magnitude is None else self._magnitude + magnitude
        self.largest = max(self.largest, float(inputs.abs().max()))
        self.num_tokens += len(x)
        return self.dense(x)

    @property
    def moment(self) -> Tensor:
        """Mean of x·xᵀ, [in, in]; the identity if no token came."""
        if self._moment is None:
            return torch.eye(next(iter(self.matrices.values())).shape[1])
        return self._moment / self.num_tokens

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, [in]."""
        return self.moment.diagonal() if self._magnitude is None else self._magnitude / self.num_tokens

    def replace(self, matrices: dict[str, Tensor]) -> None:
        self.dense.weight = pack_weight(torch.cat([matrices[name] for name in self.matrices]))


def layers_with_inputs(model: str, samples: Sequence[Sequence[int]]) -> Iterator[list[RecordingMethod]]:
    """The linear layers of each decoder layer, after `samples` (token ids) ran through it in float32.

    Later layers see the output of weights that the caller replaced.
    """
    longest = max(map(len, samples), default=1)
    num_layers = EngineConfig.resolve(EngineArgs(model=model, device="cpu")).model.num_layers
    config = EngineConfig.resolve(
        EngineArgs(
            model=model,
            device="cpu",
            dtype="float32",
            block_size=BLOCK_SIZE,
            pipeline_parallel_size=num_layers,
            max_model_len=longest,
            kv_cache_memory_bytes=2**40,  # checked against longest requests only; the cache below is for one
        )
    )
    plans = [_prefill(sample) for sample in samples]
    hidden: list[Tensor | None] = [None] * len(plans)
    for stage in range(num_layers):
        methods: list[RecordingMethod] = []

        def make_method(name: str, methods: list[RecordingMethod] = methods) -> LinearMethod:
            methods.append(RecordingMethod())
            return methods[-1]

        runner = ModelRunner(config, stage, 0, torch.device("cpu"), make_method)
        runner.load()
        runner.allocate_kv(-(-longest // BLOCK_SIZE))
        for plan, x in zip(plans, hidden, strict=True):
            runner.execute(plan, x)
        yield [method for method in methods if method.matrices]
        hidden = [runner.execute(plan, x) for plan, x in zip(plans, hidden, strict=True)]


def _prefill(token_ids: Sequence[int]) -> StepPlan:
    """One whole sequence in blocks 0, 1, …; samples nothing."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    return StepPlan(
        epoch=0,
        step=0,
        seq_ids=[0],
        query_lens=np.array([len(token_ids)], np.int32).tobytes(),
        context_lens=np.zeros(1, np.int32).tobytes(),
        token_ids=np.array(token_ids, np.int32).tobytes(),
        block_tables=np.arange(num_blocks, dtype=np.int32).tobytes(),
        max_blocks=num_blocks,
        samples=[None],
    )

"""How a model is cut: tensor parallel ranks inside a stage, pipeline stages over contiguous layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.config.errors import ConfigError
from stagemesh.config.model import ModelConfig

NUM_SUGGESTIONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """Who holds what in one lane. Ranks are numbered stage by stage: `stage * tp_size + tp_rank`."""

    tp_size: int
    """Ranks that share every layer of a stage."""
    pp_size: int
    """Stages."""
    layer_ranges: tuple[tuple[int, int], ...]
    """[start, end) of each stage's layers."""
    kv_heads_per_rank: int
    kv_replication: int
    """How many ranks hold a copy of the same KV head; above 1 when there are more ranks than KV heads."""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def num_layers(self, stage: int) -> int:
        start, end = self.layer_ranges[stage]
        return end - start

    @classmethod
    def resolve(
        cls, model: ModelConfig, tp_size: int, pp_size: int, partition: Sequence[int] | None = None
    ) -> ParallelPlan:
        """Cut `model`, or raise ConfigError with the reason and the nearest layouts that work.

        `partition`: layers per stage; None splits evenly (see `even_partition`).
        """
        if (reason := _tp_problem(model, tp_size)) is not None:
            raise ConfigError("tensor_parallel_size", tp_size, reason + _suggest(model, tp_size, pp_size))
        if not 1 <= pp_size <= model.num_layers:
            reason = f"must be within 1 and num_hidden_layers={model.num_layers}"
            raise ConfigError("pipeline_parallel_size", pp_size, reason + _suggest(model, tp_size, pp_size))
        layers = even_partition(model.num_layers, pp_size) if partition is None else tuple(partition)
        _check_partition(layers, model.num_layers, pp_size)
        starts = [sum(layers[:stage]) for stage in range(pp_size + 1)]
        return cls(
            tp_size=tp_size,
            pp_size=pp_size,
            layer_ranges=tuple(zip(starts, starts[1:], strict=False)),
            kv_heads_per_rank=max(1, model.num_kv_heads // tp_size),
            kv_replication=max(1, tp_size // model.num_kv_heads),
        )


def even_partition(num_layers: int, pp_size: int) -> tuple[int, ...]:
    """Layers per stage, as equal as they go.

    What is left over goes to the stages from the last but one backwards: the last stage also computes the
    logits and samples, the first embeds and runs beside the scheduler, so both are spared if they can be.
    """
    each, left_over = divmod(num_layers, pp_size)
    layers = [each] * pp_size
    for i in range(left_over):
        layers[-2 - i] += 1
    return tuple(layers)


def _check_partition(layers: tuple[int, ...], num_layers: int, pp_size: int) -> None:
    if len(layers) != pp_size:
        reason = f"names {len(layers)} stages, pipeline_parallel_size={pp_size}"
    elif min(layers) < 1:
        reason = "every stage needs at least 1 layer"
    elif sum(layers) != num_layers:
        reason = f"adds up to {sum(layers)}, the model has num_hidden_layers={num_layers}"
    else:
        return
    fits = list(even_partition(num_layers, pp_size))
    raise ConfigError("pipeline_layer_partition", list(layers), f"{reason}; {fits} would work")


def _tp_problem(model: ModelConfig, tp_size: int) -> str | None:
    """Why the layers cannot be shared by `tp_size` ranks, or None when they can."""
    if tp_size < 1:
        return "must be at least 1"
    if model.num_heads % tp_size:
        return f"does not divide num_attention_heads={model.num_heads}"
    if max(model.num_kv_heads, tp_size) % min(model.num_kv_heads, tp_size):
        return f"neither divides num_key_value_heads={model.num_kv_heads} nor is a multiple of it"
    if model.intermediate_size % tp_size:
        return f"does not divide intermediate_size={model.intermediate_size}"
    return None


def _suggest(model: ModelConfig, tp_size: int, pp_size: int) -> str:
    """The working layouts nearest in number of devices, then in tensor parallel size."""
    wanted = tp_size * pp_size
    works = [
        (tp, pp)
        for tp in range(1, model.num_heads + 1)
        if _tp_problem(model, tp) is None
        for pp in range(1, model.num_layers + 1)
    ]
    works.sort(key=lambda layout: (abs(layout[0] * layout[1] - wanted), abs(layout[0] - tp_size)))
    shown = ", ".join(f"{tp}x{pp}" for tp, pp in works[:NUM_SUGGESTIONS])
    return f"; nearest layouts (tensor x pipeline) that work: {shown}"

"""The tensors that a rank holds, counted from the model's shapes alone: what stages/ loads, without its checkpoint.

Counted for rank 0 of a stage, which holds the most: the biases of row-parallel layers and, with expert parallelism,
never fewer experts than another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stagemesh.config.model import MlaConfig, ModelConfig, MoeConfig, MoeNames
from stagemesh.config.parallel import ParallelPlan, expert_range, kv_heads
from stagemesh.config.quantization import W4A16, Quantization

PER_WORD = 8
"""4-bit weights in an int32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """`count` matrices [rows, columns] of one layer on a rank."""

    name: str
    """As in the checkpoint, without `.weight`: formats leave some layers dense."""
    rows: int
    columns: int = 1
    count: int = 1
    kind: Literal["linear", "float", "float32"] = "float"
    """linear: may be quantized; float: in the dtype of the model, always."""
    is_expert: bool = False
    """A token uses top_k of them."""

    @property
    def size(self) -> int:
        return self.count * self.rows * self.columns

    def num_bytes(self, dtype_bytes: int, quantization: Quantization | None) -> int:
        """In memory, scales and zeros included."""
        if self.kind == "float32":
            return 4 * self.size
        if self.kind == "float" or quantization is None or not quantization.covers(self.name):
            return dtype_bytes * self.size
        format = quantization.format
        if isinstance(format, W4A16):
            groups = 1 if format.group_size == -1 else -(-self.columns // format.group_size)
            packed = 4 * -(-self.columns // PER_WORD) * self.rows
            # Scales in float32, zeros in a byte, and the group of each input in 8.
            return self.count * (packed + 5 * groups * self.rows + 8 * self.columns)
        groups, columns = 1, self.columns
        if format.weights == "block":
            groups = -(-columns // format.block[1])
            columns = groups * format.block[1]
        return self.count * self.rows * (columns + 4 * groups)


def stage_weights(model: ModelConfig, plan: ParallelPlan, stage: int) -> list[Weight]:
    """All of rank 0 of `stage`."""
    start, end = plan.layer_ranges[stage]
    weights = [weight for layer in range(start, end) for weight in layer_weights(model, plan, layer)]
    return [*weights, *edge_weights(model, plan, stage == 0, stage == plan.pp_size - 1)]


def edge_weights(model: ModelConfig, plan: ParallelPlan, is_first: bool, is_last: bool) -> Iterator[Weight]:
    """The embedding of the first stage, the norm and the head of the last."""
    rows = -(-model.vocab_size // plan.tp_size)
    if is_first:
        yield Weight(name="model.embed_tokens", rows=rows, columns=model.hidden_size)
    if is_last:
        yield Weight(name="model.norm", rows=model.hidden_size)
        if not (is_first and model.tie_word_embeddings):
            yield Weight(name="lm_head", rows=rows, columns=model.hidden_size)


def layer_weights(model: ModelConfig, plan: ParallelPlan, layer: int) -> Iterator[Weight]:
    name = f"model.layers.{layer}"
    yield Weight(name=f"{name}.input_layernorm", rows=model.hidden_size)
    yield Weight(name=f"{name}.post_attention_layernorm", rows=model.hidden_size)
    if model.mla is not None:
        yield from _latent_attention(model, model.mla, plan, f"{name}.self_attn")
    else:
        yield from _attention(model, plan, f"{name}.self_attn")
    if model.moe is not None and layer in model.moe.layers:
        yield from _mixture(model, model.moe, plan, name)
    else:
        width = model.intermediate_size // plan.tp_size
        yield from _mlp(f"{name}.mlp.{{}}", model.hidden_size, width)
        if model.mlp_bias:
            yield Weight(name=f"{name}.mlp.bias", rows=2 * width + model.hidden_size)


def num_parameters(model: ModelConfig) -> int:
    return sum(weight.size for weight in stage_weights(model, ParallelPlan.resolve(model, 1, 1), 0))


def weight_bytes(
    model: ModelConfig, plan: ParallelPlan, stage: int, dtype_bytes: int, quantization: Quantization | None
) -> int:
    """Weights of each rank of `stage`."""
    return sum(weight.num_bytes(dtype_bytes, quantization) for weight in stage_weights(model, plan, stage))


def _attention(model: ModelConfig, plan: ParallelPlan, name: str) -> Iterator[Weight]:
    dim, hidden = model.head_dim, model.hidden_size
    features = model.num_heads // plan.tp_size * dim
    rows = features + 2 * len(kv_heads(model, plan.tp_size, 0)) * dim
    yield Weight(name=f"{name}.q_proj", rows=rows, columns=hidden, kind="linear")
    yield Weight(name=f"{name}.o_proj", rows=hidden, columns=features, kind="linear")
    if model.qkv_bias:
        yield Weight(name=f"{name}.q_proj.bias", rows=rows)
    if model.output_bias:
        yield Weight(name=f"{name}.o_proj.bias", rows=hidden)
    if model.qk_norm:
        yield Weight(name=f"{name}.q_norm", rows=dim, count=2)


def _latent_attention(model: ModelConfig, mla: MlaConfig, plan: ParallelPlan, name: str) -> Iterator[Weight]:
    heads, hidden = model.num_heads // plan.tp_size, model.hidden_size
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    query, width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim), mla.q_lora_rank
    if width is None:
        yield Weight(name=f"{name}.q_proj", rows=query, columns=hidden, kind="linear")
    else:
        yield Weight(name=f"{name}.q_a_proj", rows=width, columns=hidden, kind="linear")
        yield Weight(name=f"{name}.q_a_layernorm", rows=width)
        yield Weight(name=f"{name}.q_b_proj", rows=query, columns=width, kind="linear")
    yield Weight(name=f"{name}.kv_a_proj_with_mqa", rows=latent, columns=hidden, kind="linear")
    yield Weight(name=f"{name}.kv_a_layernorm", rows=mla.kv_lora_rank)
    if model.output_bias:
        yield Weight(name=f"{name}.bias", rows=(width or 0) + latent + hidden)
    # Split into one matrix per head for keys and one for values, in floats whatever the checkpoint's format.
    expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield Weight(name=f"{name}.kv_b_proj", rows=expanded, columns=mla.kv_lora_rank)
    yield Weight(name=f"{name}.o_proj", rows=hidden, columns=heads * mla.v_head_dim, kind="linear")


def _mixture(model: ModelConfig, moe: MoeConfig, plan: ParallelPlan, name: str) -> Iterator[Weight]:
    names: MoeNames = getattr(model.family, "expert_names")  # noqa: B009  a family of stages/ has it
    hidden, experts, width = model.hidden_size, moe.num_experts, moe.intermediate_size
    router: Literal["float", "float32"] = "float32" if moe.float32_router else "float"
    yield Weight(name=f"{name}.{names.router}", rows=experts, columns=hidden, kind=router)
    if moe.sigmoid:
        yield Weight(name=f"{name}.{names.choice_bias}", rows=experts, kind="float32")
    if plan.expert_parallel:
        experts = len(expert_range(experts, plan.tp_size, 0))
    else:
        width //= plan.tp_size
    expert = f"{name}.{names.expert.format(0)}.{{}}"
    yield from _mlp(expert, hidden, width, names.projections, count=experts, is_expert=True)
    if moe.shared_intermediate_size:
        yield from _mlp(f"{name}.{names.shared_expert}.{{}}", hidden, moe.shared_intermediate_size // plan.tp_size)
        if moe.shared_gate:
            yield Weight(name=f"{name}.{names.shared_gate}", rows=1, columns=hidden)


def _mlp(
    name: str,
    hidden: int,
    width: int,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    *,
    count: int = 1,
    is_expert: bool = False,
) -> Iterator[Weight]:
    """name: with {} for the projection."""
    gate, _, down = projections
    gate_name, down_name = name.format(gate), name.format(down)
    yield Weight(name=gate_name, rows=2 * width, columns=hidden, count=count, kind="linear", is_expert=is_expert)
    yield Weight(name=down_name, rows=hidden, columns=width, count=count, kind="linear", is_expert=is_expert)

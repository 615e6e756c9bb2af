"""What config/ counts from shapes is what ranks load and allocate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_harness import ThreadLane, make_checkpoint

from stagemesh.config.capacity import capacity_line
from stagemesh.config.planner.hardware import make_cluster
from stagemesh.config.planner.report import make_plan, make_workload
from stagemesh.config.weights import weight_bytes
from stagemesh.deployments.cli.plan import read_model

REPO = Path(__file__).parents[3]
SMALL_MLA: dict[str, Any] = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "DeepseekV3": SMALL_MLA,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **FAMILIES[request.param])


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: oneDNN's packed layout has a size of its own, and a packed head is a copy of a tied embedding."""
    for module in ("linear", "embedding", "moe"):
        monkeypatch.setattr(f"stagemesh.stages.layers.{module}.pack_weight", lambda weight: weight)


def held_bytes(root: object) -> int:
    """Of all tensors below `root`, views of one memory once."""
    seen: set[int] = set()
    memory: dict[int, int] = {}

    def walk(item: object) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
            return
        for child in children(item):
            walk(child)

    walk(root)
    return sum(memory.values())


def children(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list | tuple):
        yield from item
    elif type(item).__module__.startswith("stagemesh.stages"):
        yield from vars(item).values() if hasattr(item, "__dict__") else ()
        yield from (getattr(item, name) for name in getattr(type(item), "__slots__", ()))


@pytest.mark.parametrize("tp, partition", [(1, None), (2, (2, 1)), (4, (1, 2))])
def test_a_rank_loads_the_bytes_that_are_counted(folder: Path, tp: int, partition: tuple[int, ...] | None) -> None:
    has_experts = read_model(str(folder)).moe is not None
    for expert_parallel in (False, True)[: 1 + has_experts]:
        for quantization in ("auto", "fp8"):
            args = {"enable_expert_parallel": expert_parallel, "quantization": quantization}
            check_bytes(ThreadLane(folder, tp=tp, partition=partition, args=args))


def check_bytes(lane: ThreadLane) -> None:
    config = lane.config
    for stage, ranks in enumerate(lane.stages):
        model = ranks[0]._model
        assert model is not None
        # Counters of tokens per expert, 8 bytes each, and the map of experts to ranks are no weights.
        moe = config.model.moe
        counters = len(model.mixtures) * moe.num_experts * (8 + 8 * config.plan.expert_parallel) if moe else 0
        counted = weight_bytes(config.model, config.plan, stage, config.dtype_bytes, config.quantization)
        assert held_bytes(model) - counters == counted


@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_plan_and_start_up_say_the_same_of_the_demo_models(name: str) -> None:
    folder, memory = REPO / "config/models" / name, 64 * 2**20
    model = read_model(str(folder))
    work = make_workload(model, concurrency=8, context=2048, dtype="float32", kv_cache_memory_bytes=memory)
    plan = make_plan(work, make_cluster("4xCPU-8GB"))
    assert {(4, 1), (2, 2), (1, 4), (1, 1)} <= {(x.plan.tp_size, x.plan.pp_size) for x in plan.layouts}
    for layout in plan.layouts:
        args = {
            "kv_cache_memory_bytes": memory,
            "dtype": "float32",
            "enable_expert_parallel": layout.plan.expert_parallel,
        }
        lane = ThreadLane(folder, tp=layout.plan.tp_size, partition=layout.partition, args=args)
        blocks = min(runner.max_kv_blocks() for ranks in lane.stages for runner in ranks)
        num_tokens = blocks * lane.config.block_size
        assert plan.capacity_line(layout) == capacity_line("cpu", num_tokens, lane.config.max_model_len)

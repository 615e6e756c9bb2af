"""Where dispatching tokens to the experts' owners begins to pay, over gloo processes of this machine.

    python tests/bench/bench_expert_parallel.py [ranks] [experts] [top_k] [hidden] [expert intermediate size]

Prints milliseconds of one mixture layer for each number of tokens, replicated and dispatched. MIN_DISPATCH_TOKENS
and should_dispatch in stages/layers/moe.py come from here.
"""

from __future__ import annotations

import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from stagemesh.config.model import MoeConfig, MoeNames
from stagemesh.stages.layers import moe as moe_layer
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.moe import MoE
from stagemesh.stages.layers.tensor_parallel import DistGroup, TensorShard

SIZES = (1, 16, 64, 256, 1024, 4096)
REPEATS = 7


class RandomCheckpoint(Checkpoint):
    """Random tensors by name, the same on every rank."""

    def __init__(self) -> None:
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def view(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], dtype: torch.dtype | None) -> Tensor:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.02)[part]


def measure(rank: int, store: str, size: int, num_experts: int, top_k: int, hidden: int, inner: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=inner,
        norm_topk_prob=True,
        shared_intermediate_size=0,
        layers=frozenset([0]),
    )
    names = MoeNames("gate", "experts.{}", ("w1", "w3", "w2"))
    shard = TensorShard(rank, size, DistGroup())
    layer = MoE("moe", names, moe, hidden, shard, expert_parallel=True)
    checkpoint = RandomCheckpoint()
    layer.load(checkpoint)
    for num_tokens in SIZES:
        x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(0))
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(REPEATS):
            for dispatched in (False, True):
                moe_layer.should_dispatch = lambda *_, answer=dispatched: answer
                dist.barrier()
                start = time.perf_counter()
                with torch.inference_mode():
                    layer(x)
                times[dispatched].append(time.perf_counter() - start)
        if rank == 0:
            replicated, sent = (1000 * sorted(times[way])[REPEATS // 2] for way in (False, True))
            print(f"{num_tokens:6} tokens: replicated {replicated:9.2f} ms, dispatched {sent:9.2f} ms", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    size, *shape = (given + [2, 8, 2, 512, 256][len(given) :])[:5]
    print(f"{size} ranks, {shape[0]} experts, top {shape[1]}, hidden {shape[2]}, intermediate {shape[3]}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(f"{folder}/store", size, *shape), nprocs=size)

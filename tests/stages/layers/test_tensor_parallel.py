"""The process-group collectives, two and three gloo ranks in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stagemesh.stages.layers.tensor_parallel import DistGroup, SingleRank, TensorShard


def _check_rank(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        group = DistGroup(dist.new_group(list(range(size))))
        assert (group.rank, group.size) == (rank, size)
        for dtype in (torch.float32, torch.bfloat16):
            mine = torch.full((3, 2), 1.0 + rank, dtype=dtype)
            total = sum(1.0 + r for r in range(size))
            assert torch.equal(group.all_reduce(mine.clone()), torch.full((3, 2), total, dtype=dtype))
            # A strided input, as a slice of a larger activation is.
            strided = torch.full((3, 4), 1.0 + rank, dtype=dtype)[:, ::2]
            assert torch.equal(group.all_reduce(strided), torch.full((3, 2), total, dtype=dtype))
            side_by_side = torch.cat([torch.full((3, 2), 1.0 + r, dtype=dtype) for r in range(size)], 1)
            assert torch.equal(group.all_gather(mine, 1), side_by_side)
            gathered = group.gather_to_rank0(mine, 1)
            assert torch.equal(gathered, side_by_side) if rank == 0 else gathered is None
            # r sends s + 2·r rows to s, none from 0 to itself; a row says from where to where.
            sent = [torch.tensor([[10.0 * rank + s, 1.0]]).expand(s + 2 * rank, 2) for s in range(size)]
            sends, receives = [s + 2 * rank for s in range(size)], [rank + 2 * s for s in range(size)]
            arrived = group.all_to_all(torch.cat(sent).to(dtype), sends, receives)
            expected = [torch.tensor([[10.0 * s + rank, 1.0]]).expand(rank + 2 * s, 2) for s in range(size)]
            assert torch.equal(arrived, torch.cat(expected).to(dtype))
        assert torch.equal(TensorShard(rank, size, group).all_reduce(torch.ones(2)), torch.full((2,), float(size)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_ranks_reduce_and_gather_in_rank_order(tmp_path: Path, size: int) -> None:
    mp.spawn(_check_rank, args=(size, str(tmp_path / "store")), nprocs=size)


def test_a_single_rank_changes_nothing() -> None:
    group, x = SingleRank(), torch.ones(2, 2)
    assert group.all_reduce(x) is x
    assert group.all_gather(x, 0) is x
    assert group.gather_to_rank0(x, 0) is x
    assert group.all_to_all(x, [2], [2]) is x
    assert TensorShard().all_reduce(x) is x

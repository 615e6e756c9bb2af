from __future__ import annotations

import pytest
import torch

from stagemesh.kernels.store_kv import store_kv, store_kv_torch


def test_each_token_goes_to_its_slot_and_nothing_else_changes() -> None:
    num_blocks, kv_heads, block_size, head_dim = 4, 2, 3, 5
    cache = torch.full((num_blocks, 2, kv_heads, block_size, head_dim), -1.0)
    kv = torch.arange(2 * 2 * kv_heads * head_dim, dtype=torch.float32).view(2, 2 * kv_heads, head_dim)
    store_kv(kv, cache, torch.tensor([7, 3]))  # block 2 offset 1, block 1 offset 0

    for token, (block, offset) in enumerate([(2, 1), (1, 0)]):
        assert torch.equal(cache[block, 0, :, offset], kv[token, :kv_heads])
        assert torch.equal(cache[block, 1, :, offset], kv[token, kv_heads:])
    assert (cache == -1).sum() == cache.numel() - kv.numel()


@pytest.mark.parametrize("num_tokens, kv_heads, block_size, head_dim", [(0, 1, 4, 8), (9, 3, 4, 20), (5, 1, 16, 64)])
def test_triton_stores_the_same(
    triton_device: torch.device, num_tokens: int, kv_heads: int, block_size: int, head_dim: int
) -> None:
    from stagemesh.kernels.store_kv_triton import store_kv_triton

    torch.manual_seed(0)
    shape = (6, 2, kv_heads, block_size, head_dim)
    ours = torch.full(shape, float("nan"), device=triton_device)
    theirs = ours.clone()
    kv = torch.randn(num_tokens, 2 * kv_heads + 2, head_dim, device=triton_device)[:, 2:]
    slots = torch.randperm(6 * block_size)[:num_tokens].to(triton_device)
    store_kv_triton(kv, ours, slots)
    store_kv_torch(kv, theirs, slots)
    assert torch.equal(ours.nan_to_num(99), theirs.nan_to_num(99))

from __future__ import annotations

import pytest
import torch

from stagemesh.stages.worker.kv_cache import make_kv_cache

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_cache_is_zero_and_can_be_written(dtype: torch.dtype) -> None:
    first, second = make_kv_cache(2, 3, (2, 4, 16, 8), dtype, CPU)
    assert first.shape == (3, 2, 4, 16, 8) and first.dtype == dtype and first.is_contiguous()
    first[1] = torch.ones(2, 4, 16, 8, dtype=dtype)
    assert first.float().sum() == 2 * 4 * 16 * 8
    assert second.float().abs().sum() == 0


def test_memory_is_taken_only_when_a_block_is_written() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[1]) * 4096

    before = resident()
    cache = make_kv_cache(1, 1024, (2, 1, 16, 4096), torch.float32, CPU)  # 512 MiB
    assert resident() - before < 128 * 2**20
    assert cache[0][-1].sum() == 0

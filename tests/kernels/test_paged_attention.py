"""Three implementations of one thing: reference, CPU fast path, Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from stagemesh.kernels import paged_attention_cpu
from stagemesh.kernels.paged_attention import PagedAttentionStep, paged_attention
from stagemesh.kernels.paged_attention_cpu import CpuPagedAttention
from stagemesh.kernels.store_kv import store_kv

# (query_len, context_len) of each sequence
BATCHES = {
    "one decode": [(1, 0)],
    "equal decodes": [(1, 20), (1, 17), (1, 31)],
    "decodes of all lengths": [(1, 3), (1, 200), (1, 40), (1, 0), (1, 199), (1, 7)],
    "one prefill": [(37, 0)],
    "a chunk with context": [(19, 45)],
    "a long prefill": [(300, 10)],
    "a mixed step": [(1, 64), (12, 0), (1, 5), (2, 33), (1, 150), (40, 4)],
}
SHAPES = {"gqa": (6, 2, 16), "one kv head": (5, 1, 8), "no gqa, odd": (3, 3, 20)}  # H, K, D


@dataclass
class Case:
    """A step whose cache is filled as earlier steps would have left it."""

    q: Tensor
    kv: Tensor
    cache: Tensor
    query_lens: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    slots: np.ndarray
    expected: Tensor
    scale: float
    window: int | None


def make_case(
    batch: list[tuple[int, int]],
    shape: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> Case:
    num_heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    widths = [-(-(query + context) // block_size) for query, context in batch]
    free = rng.permutation(sum(widths) + 5).astype(np.int32)
    cache = torch.zeros(len(free), 2, kv_heads, block_size, head_dim, dtype=dtype)
    tables = np.full((len(batch), max(widths) + 2), -1, np.int32)
    num_tokens = sum(query for query, _ in batch)
    # Query heads, keys and values lie side by side, as the projection leaves them.
    qkv = torch.randn(num_tokens, num_heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    q, kv = qkv[:, :num_heads], qkv[:, num_heads:]
    scale = 0.3
    slots, expected = [], []
    used = start = 0
    for s, (query, context) in enumerate(batch):
        tables[s, : widths[s]] = free[used : used + widths[s]]
        used += widths[s]
        positions = np.arange(context + query)
        places = tables[s, positions // block_size].astype(np.int64) * block_size + positions % block_size
        past = torch.randn(context, 2 * kv_heads, head_dim, generator=generator).to(dtype)
        store_kv(past, cache, torch.from_numpy(places[:context]))
        slots.append(places[context:])
        whole = torch.cat((past, kv[start : start + query])).float().transpose(0, 1)
        expected.append(
            scaled_dot_product_attention(
                q[start : start + query].float().transpose(0, 1),
                whole[:kv_heads].repeat_interleave(num_heads // kv_heads, 0),
                whole[kv_heads:].repeat_interleave(num_heads // kv_heads, 0),
                visible(query, context, window),
                scale=scale,
            ).transpose(0, 1)
        )
        start += query
    lens = np.array(batch, np.int32)
    return Case(
        q,
        kv,
        cache,
        lens[:, 0],
        lens[:, 1],
        tables,
        np.concatenate(slots),
        torch.cat(expected).flatten(1),
        scale,
        window,
    )


def visible(query: int, context: int, window: int | None) -> Tensor:
    """bool [query, context + query], from the definition."""
    queries, keys = torch.arange(context, context + query)[:, None], torch.arange(context + query)
    return (keys <= queries) & (keys > queries - (window or context + query))


def run_cpu(case: Case) -> Tensor:
    _, _, kv_heads, block_size, head_dim = case.cache.shape
    attention = CpuPagedAttention(case.q.shape[1], kv_heads, block_size, head_dim, case.q.dtype, case.window)
    step = attention.prepare(case.query_lens, case.context_lens, case.block_tables, case.slots)
    return step(case.q, case.kv, case.cache, case.scale)


def run_step(case: Case, device: torch.device) -> Tensor:
    step = PagedAttentionStep.on_device(
        case.query_lens, case.context_lens, case.block_tables, case.slots, device, case.window
    )
    qkv, cache = torch.cat((case.q, case.kv), 1).to(device), case.cache.to(device)
    num_heads = case.q.shape[1]
    return step(qkv[:, :num_heads], qkv[:, num_heads:], cache, case.scale).cpu()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # bf16 scores and weights are off by up to 2⁻⁹ each, and so is the result.
    error = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 0.02}[dtype]
    return {"rtol": error, "atol": error}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_reference_agrees_with_dense_attention(batch: list[tuple[int, int]], shape: tuple[int, int, int]) -> None:
    case = make_case(batch, shape, 4, torch.float32)
    assert_close(run_step(case, torch.device("cpu")), case.expected, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_cpu_path_agrees_with_dense_attention(
    batch: list[tuple[int, int]], shape: tuple[int, int, int], block_size: int, dtype: torch.dtype
) -> None:
    case = make_case(batch, shape, block_size, dtype)
    assert_close(run_cpu(case).float(), case.expected, **tolerance(dtype))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_cpu_path_gives_the_same_in_small_groups_and_tiles(
    batch: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention_cpu, "MAX_GROUP_BYTES", 20_000)
    monkeypatch.setattr(paged_attention_cpu, "MAX_SCORE_BYTES", 1_000)
    case = make_case(batch, SHAPES["gqa"], 4, torch.float32)
    assert_close(run_cpu(case), case.expected, **tolerance(torch.float32))


def test_layers_share_one_prepared_step_and_steps_one_workspace() -> None:
    first, second = (
        make_case(BATCHES[name], SHAPES["gqa"], 4, torch.float32) for name in ("a mixed step", "equal decodes")
    )
    attention = CpuPagedAttention(6, 2, 4, 16, torch.float32)
    for case in (first, second, first):
        step = attention.prepare(case.query_lens, case.context_lens, case.block_tables, case.slots)
        for _ in range(2):
            assert_close(
                step(case.q, case.kv, case.cache.clone(), case.scale),
                case.expected,
                **tolerance(torch.float32),
            )


@pytest.mark.parametrize("window", [1, 3, 8, 30, 64, 500])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_sliding_window_hides_what_lies_further_back(
    batch: list[tuple[int, int]], shape: tuple[int, int, int], window: int
) -> None:
    case = make_case(batch, shape, 4, torch.float32, window)
    assert_close(run_cpu(case), case.expected, **tolerance(torch.float32))
    assert_close(run_step(case, torch.device("cpu")), case.expected, **tolerance(torch.float32))


@pytest.mark.parametrize("window", [40, 100])
def test_a_window_across_several_tiles_of_a_prefill(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(paged_attention_cpu, "MAX_TILE", 32)
    case = make_case(BATCHES["a long prefill"], SHAPES["gqa"], 4, torch.float32, window)
    assert_close(run_cpu(case), case.expected, **tolerance(torch.float32))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_cache_of_one_side_is_key_and_value_in_one(batch: list[tuple[int, int]]) -> None:
    two_sided = make_case(batch, (6, 1, 16), 4, torch.float32)
    two_sided.cache[:, 1] = two_sided.cache[:, 0]
    two_sided.kv[:, 1] = two_sided.kv[:, 0]
    one_sided = replace(two_sided, kv=two_sided.kv[:, :1], cache=two_sided.cache[:, :1].contiguous())
    expected = run_step(two_sided, torch.device("cpu"))

    attention = CpuPagedAttention(6, 1, 4, 16, torch.float32, kv_factor=1)
    lens_and_tables = (one_sided.query_lens, one_sided.context_lens, one_sided.block_tables, one_sided.slots)
    step = attention.prepare(*lens_and_tables)
    assert_close(step(one_sided.q, one_sided.kv, one_sided.cache.clone(), one_sided.scale), expected)
    assert_close(run_step(one_sided, torch.device("cpu")), expected)


def test_padding_reads_nothing_of_other_sequences() -> None:
    """What stands in blocks that a sequence does not own, or behind its end, must not matter."""
    case = make_case(BATCHES["decodes of all lengths"], SHAPES["gqa"], 4, torch.float32)
    owned = {int(block) for block in case.block_tables.ravel() if block >= 0}
    for block in set(range(len(case.cache))) - owned:
        case.cache[block] = 1e30
    assert_close(run_cpu(case), case.expected, **tolerance(torch.float32))
    assert_close(
        paged_attention(
            case.q,
            case.cache,
            torch.arange(len(case.query_lens) + 1, dtype=torch.int32),
            torch.from_numpy(case.context_lens),
            torch.from_numpy(case.block_tables),
            case.scale,
        ).flatten(1),
        case.expected,
        **tolerance(torch.float32),
    )


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_agrees_with_dense_attention(
    triton_device: torch.device,
    batch: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    window: int | None,
) -> None:
    from stagemesh.kernels.paged_attention_triton import paged_attention_triton
    from stagemesh.kernels.store_kv_triton import store_kv_triton

    if dtype == torch.bfloat16 and triton_device.type == "cpu":
        pytest.skip("Triton's interpreter (3.7.1, 3.9.0) multiplies bfloat16 matrices as if their bits were integers")
    case = make_case(batch, shape, 4, dtype, window)
    q, kv, cache = case.q.to(triton_device), case.kv.to(triton_device), case.cache.to(triton_device)
    starts = torch.from_numpy(np.concatenate(([0], case.query_lens.cumsum())).astype(np.int32)).to(triton_device)
    store_kv_triton(kv, cache, torch.from_numpy(case.slots).to(triton_device))
    out = paged_attention_triton(
        q,
        cache,
        starts,
        torch.from_numpy(case.context_lens.copy()).to(triton_device),
        torch.from_numpy(case.block_tables).to(triton_device),
        case.scale,
        window,
    )
    assert_close(out.flatten(1).float().cpu(), case.expected, **tolerance(dtype))

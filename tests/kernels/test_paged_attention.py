"""Three implementations of one thing: reference, CPU fast path, Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from stagemesh.kernels import paged_attention_cpu
from stagemesh.kernels.paged_attention import PagedAttentionStep, paged_attention, paged_attention_torch
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
    _, kv_factor, kv_heads, block_size, head_dim = case.cache.shape
    shape = (case.q.shape[1], kv_heads, block_size, head_dim)
    attention = CpuPagedAttention(*shape, case.q.dtype, case.window, kv_factor)
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


def beside_nan(batch: list[tuple[int, int]], window: int | None, kv_factor: int = 2) -> list[Case]:
    """The steps that lead to `batch`, in a clean cache and in one where earlier owners of the blocks left NaN.

    First all cached tokens in one prefill, then the batch.
    """
    whole = make_case(batch, SHAPES["gqa"], 4, torch.float32, window)
    past = [(context, 0) for _, context in batch]
    steps: list[Case] = []
    for fill in (0.0, math.nan):
        cache = torch.full_like(whole.cache[:, :kv_factor], fill)
        for lens in (past, batch):
            rows = [s for s, (query, _) in enumerate(lens) if query]
            if not rows:
                continue
            query_lens, context_lens = (np.array([lens[s][i] for s in rows], np.int32) for i in (0, 1))
            positions = [np.arange(context, context + query) for query, context in (lens[s] for s in rows)]
            slots = [
                whole.block_tables[s, p // 4].astype(np.int64) * 4 + p % 4 for s, p in zip(rows, positions, strict=True)
            ]
            qkv = torch.randn(
                query_lens.sum(), 6 + kv_factor * 2, 16, generator=torch.Generator().manual_seed(len(rows))
            )
            lens_and_tables = (query_lens, context_lens, whole.block_tables[rows], np.concatenate(slots))
            steps.append(Case(qkv[:, :6], qkv[:, 6:], cache, *lens_and_tables, torch.empty(0), 0.3, window))
    return steps


@pytest.mark.parametrize("kv_factor", [1, 2])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("implementation", ["cpu", "reference", "triton"])
def test_what_earlier_owners_left_in_the_cache_reaches_no_sequence(
    triton_device: torch.device, implementation: str, batch: list[tuple[int, int]], window: int | None, kv_factor: int
) -> None:
    from stagemesh.kernels.paged_attention_triton import paged_attention_triton

    if implementation == "triton" and kv_factor == 1:
        pytest.skip("the Triton kernel has no cache of one side")

    def run(case: Case) -> Tensor:
        if implementation == "cpu":
            return run_cpu(case)
        store_kv(case.kv, case.cache, torch.from_numpy(case.slots))
        starts = torch.from_numpy(np.concatenate(([0], case.query_lens.cumsum())).astype(np.int32))
        lens_and_tables = (starts, torch.from_numpy(case.context_lens.copy()), torch.from_numpy(case.block_tables))
        if implementation == "reference":
            return paged_attention_torch(case.q, case.cache, *lens_and_tables, case.scale, window).flatten(1)
        on_device = [tensor.to(triton_device) for tensor in (case.q, case.cache, *lens_and_tables)]
        return paged_attention_triton(*on_device, case.scale, window).flatten(1).cpu()

    outs = [run(case) for case in beside_nan(batch, window, kv_factor)]
    for clean, beside in zip(outs[: len(outs) // 2], outs[len(outs) // 2 :], strict=True):
        assert torch.equal(clean, beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_decode_that_begins_a_block_beside_longer_ones_sees_no_nan(dtype: torch.dtype) -> None:
    """Every token of two sequences, step by step, in blocks that all hold NaN."""
    attention = CpuPagedAttention(2, 1, 4, 8, torch.float32)
    outs = []
    for fill in (0.0, math.nan):
        cache = torch.full((9, 2, 1, 4, 8), fill).to(dtype)
        generator = torch.Generator().manual_seed(0)
        tables = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
        for i in range(8):
            query_lens = np.array([1, 8 if i == 0 else 1], np.int32)
            contexts = np.array([i, 0 if i == 0 else 7 + i], np.int32)
            positions = [np.arange(c, c + n) for c, n in zip(contexts, query_lens, strict=True)]
            slots = np.concatenate([tables[s, p // 4].astype(np.int64) * 4 + p % 4 for s, p in enumerate(positions)])
            qkv = torch.randn(query_lens.sum(), 4, 8, generator=generator)
            step = attention.prepare(query_lens, contexts, tables, slots)
            outs.append(step(qkv[:, :2], qkv[:, 2:], cache, 0.3))
    for clean, beside in zip(outs[:8], outs[8:], strict=True):
        assert torch.equal(clean, beside) and clean.isfinite().all()


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

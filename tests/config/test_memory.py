from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagemesh.config import memory
from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError

GIB = 2**30
TOKEN = 8 * 2 * 4 * 8 * 2
"""Bytes of one token's KV in the model folder: layers, key and value, heads, head_dim, bfloat16."""
PROCESSES = (4 + 1 + 1 + 1) * memory.PROCESS_BYTES
"""Of one rank's lane: Ray, router, leader, rank."""


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that is free for KV caches on one rank's lane."""

    def set_free(num_bytes: int) -> None:
        available = int(num_bytes / memory.FREE_SHARE) + PROCESSES + 1000
        monkeypatch.setattr(memory, "host_memory_available", lambda: available)

    return set_free


def resolve(model: Path, **args: Any) -> EngineConfig:
    return EngineConfig.resolve(EngineArgs.parse({"model": str(model), "device": "cpu", **args}))


def test_the_whole_context_is_taken_where_it_fits(write_model: Callable[..., Path], free: Any) -> None:
    free(10 * GIB)
    config = resolve(write_model(max_position_embeddings=32_768))
    assert config.max_model_len == 32_768
    assert config.kv_cache_memory_bytes == memory.ENOUGH_BYTES


def test_a_long_request_may_take_more_than_is_enough(write_model: Callable[..., Path], free: Any) -> None:
    free(10 * GIB)
    tokens = 6 * GIB // TOKEN
    assert resolve(write_model(max_position_embeddings=tokens)).kv_cache_memory_bytes == 6 * GIB


@pytest.mark.parametrize("length", [{}, {"max_model_len": "auto"}])
def test_the_longest_that_fits_is_taken_where_memory_is_short(
    write_model: Callable[..., Path], free: Any, length: Any
) -> None:
    free(1000 * TOKEN)
    config = resolve(write_model(max_position_embeddings=32_768), **length)
    assert config.max_model_len == 1000 // 16 * 16
    assert config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes >= config.max_model_len * TOKEN


def test_a_length_that_does_not_fit_is_refused_with_the_one_that_does(
    write_model: Callable[..., Path], free: Any
) -> None:
    free(1000 * TOKEN)
    with pytest.raises(ConfigError, match="max_model_len=2048: needs more KV cache .* max_model_len=992 would fit"):
        resolve(write_model(max_position_embeddings=32_768), max_model_len=2048)
    free(0)
    with pytest.raises(ConfigError, match="not even one block fits"):
        resolve(write_model(max_position_embeddings=32_768))


def test_the_ranks_of_a_machine_share_what_is_free(
    write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory_available", lambda: 8 * GIB)
    model = write_model(max_position_embeddings=10**7)
    for layout in (
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "autoscaling_config": {"max_replicas": 2}},
    ):
        config = resolve(model, **layout)
        assert config.kv_cache_memory_bytes is not None
        processes = (4 + 1 + 4 + 8) * memory.PROCESS_BYTES  # Ray, router, stages, ranks
        assert 8 * config.kv_cache_memory_bytes == pytest.approx((8 * GIB - processes) * memory.FREE_SHARE, rel=0.01)


def test_a_given_cache_decides_the_length_if_asked_to(write_model: Callable[..., Path]) -> None:
    model = write_model()
    assert resolve(model, kv_cache_memory_bytes=100 * TOKEN, max_model_len="auto").max_model_len == 96
    assert resolve(model, kv_cache_memory_bytes=10**9, max_model_len="auto").max_model_len == 512
    with pytest.raises(ConfigError, match="or say max_model_len=96 or auto"):
        resolve(model, kv_cache_memory_bytes=100 * TOKEN)


def test_auto_on_a_gpu_needs_the_size_of_the_cache(write_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="max_model_len='auto': needs kv_cache_memory_bytes on a GPU"):
        resolve(write_model(), device="cuda", max_model_len="auto")
    config = resolve(write_model(), device="cuda", max_model_len="auto", kv_cache_memory_bytes=100 * TOKEN)
    assert config.max_model_len == 96


@pytest.mark.parametrize(
    ("line", "base", "files"),
    [
        ("0::/user/app", "user", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:cpu,memory:/user/app",
            "memory/user",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, line: str, base: str, files: tuple[str, str, str]) -> None:
    own = tmp_path / "own"
    own.write_text(line + "\n")
    folder = tmp_path / base
    folder.mkdir(parents=True)
    limit, usage, droppable = files
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 1\n{droppable} 100\n")
    left = [memory._left_of_limit(cgroup) for cgroup in memory._limits(tmp_path, own)]
    assert min(left) == 400
    (folder / limit).write_text("max\n")
    assert min(memory._left_of_limit(cgroup) for cgroup in memory._limits(tmp_path, own)) > 2**60


def test_this_machine_has_memory() -> None:
    assert 0 < memory.host_memory_available() < 2**50

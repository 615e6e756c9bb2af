"""A machine's free memory, and the KV cache and context length that a CPU takes of it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from stagemesh.config.capacity import kv_bytes_per_token, kv_tokens
from stagemesh.config.errors import ConfigError
from stagemesh.config.model import ModelConfig
from stagemesh.config.parallel import ParallelPlan

FREE_SHARE = 0.6
"""Of what is free beside weights and processes, at most this goes to KV caches: a laptop has other programs."""
ENOUGH_BYTES = 4 * 2**30
"""KV cache of a whole machine that is exceeded only where the longest request needs more."""
PROCESS_BYTES = 300 * 2**20
"""Of a rank, a replica or a part of Ray, beside weights and cache."""
NUM_RAY_PROCESSES = 4


@dataclass(frozen=True)
class CacheLayout:
    """What shares the memory of one machine: all lanes, as if it had to hold every one of them."""

    model: ModelConfig
    plan: ParallelPlan
    kv_dtype_bytes: int
    block_size: int
    num_lanes: int
    num_routers: int
    weight_bytes: int
    """Of one lane."""

    @property
    def num_ranks(self) -> int:
        return self.num_lanes * self.plan.tp_size * self.plan.pp_size

    def tokens(self, memory_bytes: int) -> int:
        """What a lane's cache holds with this much on each rank."""
        return kv_tokens(self.model, self.plan, self.kv_dtype_bytes, max(memory_bytes, 0), self.block_size)

    def kv_bytes(self, num_tokens: int) -> int:
        """On each rank, for a cache of so many tokens."""
        stages = range(self.plan.pp_size)
        widest = max(kv_bytes_per_token(self.model, self.plan, stage, self.kv_dtype_bytes) for stage in stages)
        return -(-num_tokens // self.block_size) * self.block_size * widest


def choose_kv_bytes(layout: CacheLayout, max_model_len: int | None, max_num_seqs: int) -> tuple[int, int]:
    """(KV cache of each rank in bytes, max_model_len), from the memory that is free on this machine now.

    max_model_len: None = as many tokens as fit, at most the model's own. ConfigError names the length that would fit.
    """
    free = host_memory_available()
    stages = layout.num_lanes * layout.plan.pp_size
    processes = (NUM_RAY_PROCESSES + layout.num_routers + stages + layout.num_ranks) * PROCESS_BYTES
    room = int((free - layout.num_lanes * layout.weight_bytes - processes) * FREE_SHARE) // layout.num_ranks
    longest = max_model_len or layout.model.max_position_embeddings
    if (fits := layout.tokens(room)) < longest:
        if max_model_len is not None or fits < 1:
            raise ConfigError("max_model_len", longest, _does_not_fit(layout, free, fits))
        longest = fits
    most = layout.kv_bytes(longest * max_num_seqs)  # nothing could fill more
    enough = max(layout.kv_bytes(longest), min(ENOUGH_BYTES // layout.num_ranks, most))
    return min(room, enough), longest


def longest_that_fits(layout: CacheLayout, memory_bytes: int | None, max_model_len: int, is_auto: bool) -> int:
    """max_model_len, or with `is_auto` what the cache holds of it. ConfigError names the length that would fit.

    memory_bytes: of each rank's KV cache; None = measured on the GPU at start-up.
    """
    if memory_bytes is None:
        if is_auto:
            reason = "needs kv_cache_memory_bytes on a GPU, whose room is known only after the weights are loaded"
            raise ConfigError("max_model_len", "auto", reason)
        return max_model_len
    fits = layout.tokens(memory_bytes)
    if is_auto and fits:
        return min(fits, max_model_len)
    if fits < max_model_len:
        instead = f", cut the model further, or say max_model_len={fits} or auto" if fits else ""
        reason = (
            f"holds {fits:,} tokens of KV cache, fewer than max_model_len={max_model_len}, so the longest request "
            f"would never finish; raise it{instead}"
        )
        raise ConfigError("kv_cache_memory_bytes", memory_bytes, reason)
    return max_model_len


def _does_not_fit(layout: CacheLayout, free: int, fits: int) -> str:
    weights = layout.num_lanes * layout.weight_bytes
    would = f"max_model_len={fits} would fit" if fits else "not even one block fits: free some, or use a smaller model"
    return (
        f"needs more KV cache than there is room for: of {gib(free)} free here, weights take {gib(weights)}, and "
        f"{FREE_SHARE:.0%} of what processes leave is shared by {layout.num_ranks} ranks; {would}"
    )


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def host_memory_available() -> int:
    """Bytes that this process can still take, also inside a container."""
    return min(_machine_available(), *map(_left_of_limit, _limits()))


def _machine_available() -> int:
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) * 1024
    except OSError:  # not Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[Path, str, str]]:
    """(folder, limit, usage) of the cgroups, versions 1 and 2, that this process is in, and a row without limit."""
    found = [(root, "-", "-")]
    try:
        entries = [line.rstrip().split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return found
    for _, controllers, path in entries:
        if controllers == "":
            base, files = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the one outside of it; then the base has the limit.
        parts = Path(path).relative_to("/").parts
        found += [(base.joinpath(*parts[:depth]), *files) for depth in range(len(parts) + 1)]
    return found


def _left_of_limit(cgroup: tuple[Path, str, str]) -> int:
    """Bytes up to a cgroup's limit; a huge number without one. Cached files that can be dropped count as free."""
    folder, limit, usage = cgroup
    try:
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        droppable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        return max(0, int((folder / limit).read_text()) - used + droppable)
    except (OSError, ValueError):  # no such file, or the word "max"
        return sys.maxsize

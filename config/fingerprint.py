"""One word for configuration, code and checkpoint: processes with the same one compute the same answers.

Each process hashes its own files, so a node with other files differs.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path

import xxhash

from stagemesh.config.engine import EngineConfig
from stagemesh.config.folders import PACKAGE_ROOT

CODE_FOLDERS = ("config", "stages", "kernels", "deployments", "router")
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja")
NUM_SAMPLES = 16
SAMPLE_BYTES = 64 * 2**10
"""Of each weights' file NUM_SAMPLES such chunks are read: 30 files, 100 GB in all, are 30 MiB to read."""
WITHOUT_EFFECT = frozenset(
    {
        "model_name",
        "model_path",
        "commit",
        "served_model_names",
        "download_dir",
        "seed",
        "data_parallel_size",
        "autoscaling_config",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "num_cpus_per_worker",
        "num_router_replicas",
        "startup_timeout_s",
        "step_timeout_s",
        "drain_timeout_s",
        "max_queued_requests",
        "max_queued_tokens",
        "max_request_timeout_s",
        "max_logprobs",
        "trust_request_chat_template",
        "strict_fields",
        "api_key_hashes",
        "allowed_origins",
        "allowed_methods",
        "allowed_headers",
        "allow_credentials",
    }
)
"""Fields of EngineConfig that change neither an answer (each has its seed) nor how a lane is wired."""


def fingerprint(config: EngineConfig) -> str:
    """ "fp_" and 12 hex digits. Reads files: 20 ms for the demo, and a model from the hub is downloaded first."""
    settings = "".join(
        f"{field.name}={getattr(config, field.name)!r}\n"
        for field in fields(config)
        if field.name not in WITHOUT_EFFECT
    )
    parts = (settings.encode(), code_digest(), checkpoint_digest(config.local_model_path()))
    return f"fp_{xxhash.xxh3_128_hexdigest(b''.join(map(_framed, parts)))[:12]}"


@cache
def code_digest(root: Path = PACKAGE_ROOT) -> bytes:
    """Of all modules of the package, by name and content; as they are when it is first called."""
    files = [path for folder in CODE_FOLDERS for path in (root / folder).rglob("*.py")]
    digest = xxhash.xxh3_128()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        digest.update(_framed(name.encode()) + _framed(path.read_bytes()))
    return digest.digest()


def checkpoint_digest(folder: Path) -> bytes:
    """Of the files of a model's folder: weights by name, size and samples, the rest whole."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)):
        content = _samples(path) if path.suffix == ".safetensors" else path.read_bytes()
        digest.update(_framed(path.name.encode()) + path.stat().st_size.to_bytes(8, "little") + _framed(content))
    return digest.digest()


def _samples(path: Path) -> bytes:
    """Chunks spread evenly over the file, the first and the last bytes among them; a small file whole."""
    size = path.stat().st_size
    if size <= NUM_SAMPLES * SAMPLE_BYTES:
        return path.read_bytes()
    chunks = []
    with path.open("rb") as file:
        for i in range(NUM_SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            chunks.append(file.read(SAMPLE_BYTES))
    return b"".join(chunks)


def _framed(content: bytes) -> bytes:
    """With its length in front, so that no two lists of parts read alike."""
    return len(content).to_bytes(8, "little") + content

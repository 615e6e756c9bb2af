"""Checks, from their headers alone, that the weights' files are there and whole.

A safetensors file (https://github.com/huggingface/safetensors, README "Format") is the header's length as 8 bytes
little-endian, the header as JSON, then the tensors' bytes. Offsets count from the end of the header.
"""

from __future__ import annotations

import json
from pathlib import Path

from stagemesh.config.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own library."""


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name → its file. ConfigError names the file that is missing or broken."""
    folder = Path(folder)
    if (folder / SINGLE_FILE).exists():
        return dict.fromkeys(_tensor_names(folder / SINGLE_FILE), folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        reason = f"holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
            reason += f"; {', '.join(pickles)} may run code when read and is not accepted, convert it"
        raise ConfigError("model", str(folder), reason)
    files = {tensor: folder / shard for tensor, shard in weight_map(folder / INDEX_FILE).items()}
    tensors_of = {path: _tensor_names(path) for path in sorted(set(files.values()))}
    for tensor, path in files.items():
        if tensor not in tensors_of[path]:
            raise _broken(path, f"does not hold {tensor!r}, which {INDEX_FILE} promises")
    return files


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → name of its file. Raises ConfigError."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # A shard is a file of this folder, never a path out of it.
        if all(isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()):
            return dict(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _broken(index, "must be a JSON object whose weight_map maps tensor names to files of this folder")


def _tensor_names(path: Path) -> set[str]:
    """The tensors of one file, whose size must be what its header says."""
    if not path.is_file():
        raise _broken(path, "is missing")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            content = file.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise _broken(path, f"cannot be read: {error}") from None
    if size < 8 or (8 + header_bytes > size and header_bytes <= MAX_HEADER_BYTES):
        raise _broken(path, f"is truncated: it ends within its header, after {size} bytes")
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        expected = 8 + header_bytes + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise _broken(path, "its header is not that of a safetensors file") from None
    if size < expected:
        raise _broken(path, f"is truncated: {size} of {expected} bytes are there")
    if size > expected:
        raise _broken(path, f"is {size - expected} bytes longer than its header says")
    return set(header)


def _broken(path: Path, reason: str) -> ConfigError:
    return ConfigError("model", str(path.parent), f"{path.name} {reason}")

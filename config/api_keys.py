"""API keys: from settings, a file or the environment to hashes; the keys themselves stay nowhere."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from stagemesh.config.errors import ConfigError

VARIABLES = ("STAGEMESH_API_KEY", "VLLM_API_KEY")
PREFIX = "sha256:"
"""In front of a key that is written as its hash already."""


def key_hash(key: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_hashes(
    keys: str | Iterable[str] | None, file: str | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Of all keys; none means that none is needed. Errors do not show a key.

    keys: in plain text, or "sha256:" and the hash. file: of one key per line; # begins a comment.
    """
    all_keys = [keys] if isinstance(keys, str) else list(keys or ())
    if file is not None:
        all_keys += _lines(file)
    # A variable set to nothing is as good as not set.
    all_keys += [value for name in VARIABLES if (value := environment.get(name))]
    return tuple(sorted({_hash("api_key", key) for key in all_keys}))


def _lines(file: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", file, f"cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:  # else a file that was emptied would open the door
        raise ConfigError("api_key_file", file, "has no key")
    return keys


def _hash(field: str, key: str) -> str:
    if key.startswith(PREFIX):
        digest = key.removeprefix(PREFIX).lower()
        if re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise ConfigError(field, "…", f"after {PREFIX} there must be 64 hex digits")
        return digest
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(field, "…", "a key must be printable ASCII without blanks, and not empty")
    return key_hash(key)

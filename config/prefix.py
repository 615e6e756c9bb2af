"""Chained hashes of a prompt's blocks; here because stages/ and router/ need them and neither imports the other."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

ROOT = b"stagemesh"


def root(salt: str) -> bytes:
    """The parent of a prompt's first block. Prompts of different salts share no block."""
    return xxhash.xxh3_128(ROOT + b"/" + salt.encode()).digest() if salt else ROOT


def block_hashes(token_ids: Sequence[int], block_size: int, parent: bytes = ROOT) -> list[bytes]:
    """Hash (16 bytes, xxh3) of every full block, over its parent's hash and its own tokens.

    Equal hashes mean equal prefixes: at four billion blocks a collision has a chance of 2^-64.
    """
    tokens = memoryview(array("I", token_ids)).cast("B")
    stride = 4 * block_size
    hashes = []
    for start in range(0, len(tokens) - stride + 1, stride):
        digest = xxhash.xxh3_128(parent)
        digest.update(tokens[start : start + stride])
        parent = digest.digest()
        hashes.append(parent)
    return hashes

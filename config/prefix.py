"""Names for blocks of a prompt: the chained hash that the leader's prefix cache and the routers share.

It sits here because both `stages` and `router` need exactly the same one, and neither imports the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

ROOT = b"stagemesh"


def block_hashes(token_ids: Sequence[int], block_size: int, parent: bytes = ROOT) -> list[bytes]:
    """Hash of every full block of `token_ids`, each over its parent's hash and its own tokens.

    Equal hashes mean equal token prefixes: 16 bytes of xxh3 make an accidental collision a non-event
    (2^-64 at four billion blocks). A trailing partial block has no hash.
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

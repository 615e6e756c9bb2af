"""One word for what answers depend on."""

from __future__ import annotations

import hashlib

from stagemesh.config.engine import EngineConfig


def fingerprint(config: EngineConfig) -> str:
    """The same for equal configurations."""
    return "fp_" + hashlib.sha256(repr(config).encode()).hexdigest()[:16]

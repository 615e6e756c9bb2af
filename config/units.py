"""Numbers as people write them: 2k, 2K, 64MiB, 1.5GB."""

from __future__ import annotations

import re

UNITS = "KMGT"
_NUMBER = re.compile(r"(\d+)(\.\d+)?\s*([kmgt]?)(i?)(b?)", re.ASCII | re.IGNORECASE)


def parse_number(text: str) -> int:
    """vLLM's rule, that 2k is 2,000 and 2K is 2,048, and units of bytes: 2GB is 2·10⁹ and 2GiB 2·2³⁰. ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or ((match[2] or match[4]) and not match[3]):
        raise ValueError("must be a whole number, or a string with a unit: 2k (2,000), 2K (2,048), 64MiB or 1.5GB")
    whole, fraction, unit, binary, byte = match.groups()
    is_binary = bool(binary) or (unit.isupper() and not byte)
    if is_binary and fraction and not binary:
        raise ValueError(f"a fraction goes with a decimal unit: did you mean {whole}{fraction}{unit.lower()}?")
    power = UNITS.index(unit.upper()) + 1 if unit else 0
    return round(float(whole + (fraction or "")) * (1024 if is_binary else 1000) ** power)

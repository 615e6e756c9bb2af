"""How a request wants its tokens chosen: vLLM's `SamplingParams` names and meanings."""

from __future__ import annotations

import math

import msgspec

from stagemesh.config.errors import ConfigError


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings of one request. Checked on construction; a bad value raises ConfigError.

    Randomness is a pure function of (seed, position), so a seeded answer survives preemption and migration.
    `seed=None` means the caller does not care; the router then draws one, so that even such a request can
    be moved to another lane without a change in its answer.
    """

    max_tokens: int = 16
    """Most tokens to generate, at least 1. The engine also stops at max_model_len."""
    min_tokens: int = 0
    """Stop token ids and EOS are masked out until this many tokens exist."""
    temperature: float = 1.0
    """0 is greedy. Range 0..2 and beyond is accepted up to 100."""
    top_p: float = 1.0
    """Nucleus mass, in (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 and -1 turn it off."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest, in [0, 1]."""
    seed: int | None = None
    """Any 64-bit integer."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; matched on text by whoever detokenizes, not by the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the model's own EOS ids."""
    ignore_eos: bool = False
    """Go on past the model's EOS ids (explicit stop_token_ids still stop)."""

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "must be at least 1")
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "must be at least 0")
        _check(
            "min_tokens",
            self.min_tokens,
            self.min_tokens <= self.max_tokens,
            f"must not exceed max_tokens={self.max_tokens}",
        )
        _check(
            "temperature",
            self.temperature,
            math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0,
            "must be within [0, 100]",
        )
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "must be within (0, 1]")
        _check("top_k", self.top_k, self.top_k >= -1, "must be at least 1, or 0 or -1 for off")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "must be within [0, 1]")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "must fit 64 bits")
        for text in self.stop:
            _check("stop", text, len(text) > 0, "must not hold an empty string")


def _check(field: str, value: object, ok: bool, reason: str) -> None:
    if not ok:
        raise ConfigError(field, value, reason)

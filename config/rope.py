"""Rotary position embedding as a config.json describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from pydantic import Field

from stagemesh.config.base import Settings
from stagemesh.config.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Kinds that do not scale with a factor ignore it."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    """Context extension of every kind but "default"."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    """Positions before "llama3", "dynamic" or "yarn" extends them."""
    beta_fast: float = 32.0
    """Turns within the original positions: "yarn" keeps frequencies above, divides those below beta_slow."""
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether "yarn" rounds the bounds of its blend to whole features."""
    attention_factor: float = 1.0
    """Factor of queries and keys with "yarn"."""


def read_rope(raw: Mapping[str, Any], default_theta: float, max_position_embeddings: int) -> RopeConfig:
    """From `rope_parameters` or `rope_scaling`; `default_theta` where `raw` names no rope_theta."""
    keys = {"rope_theta": default_theta, **raw}
    if "type" in keys:  # the name of rope_type in old configs
        keys.setdefault("rope_type", keys["type"])
    return _RopeJson.parse(keys).resolve(max_position_embeddings)


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much sharper attention is when the context grows by `factor` (arXiv:2309.00071, 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class _RopeJson(Settings):
    """`rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta` merged into it (before)."""

    model_config = pydantic.ConfigDict(extra="ignore")

    rope_type: RopeKind = "default"
    rope_theta: float = Field(gt=0)
    factor: float | None = Field(default=None, ge=1)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    attention_factor: float | None = Field(default=None, gt=0)
    beta_fast: float | None = Field(default=None, gt=0)
    beta_slow: float | None = Field(default=None, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = Field(default=1.0, ge=1, le=1)

    def resolve(self, max_position_embeddings: int) -> RopeConfig:
        if self.rope_type == "yarn":
            return self._yarn(max_position_embeddings)
        needed = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }[self.rope_type]
        values = {name: getattr(self, name) for name in needed}
        for name, value in values.items():
            if value is None:
                raise ConfigError(name, None, f"is required by rope_type={self.rope_type!r}")
        if self.rope_type == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
            allowed = f"must be above low_freq_factor={values['low_freq_factor']}"
            raise ConfigError("high_freq_factor", values["high_freq_factor"], allowed)
        if self.rope_type == "dynamic":
            values["original_max_position_embeddings"] = max_position_embeddings
        return RopeConfig(theta=self.rope_theta, kind=self.rope_type, **values)

    def _yarn(self, max_position_embeddings: int) -> RopeConfig:
        original = self.original_max_position_embeddings or max_position_embeddings
        factor = self.factor or max(1.0, max_position_embeddings / original)
        attention_factor = self.attention_factor
        if attention_factor is None and self.mscale and self.mscale_all_dim:
            attention_factor = yarn_mscale(factor, self.mscale) / yarn_mscale(factor, self.mscale_all_dim)
        return RopeConfig(
            theta=self.rope_theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=self.beta_fast or 32.0,
            beta_slow=self.beta_slow or 1.0,
            truncate=self.truncate,
            attention_factor=yarn_mscale(factor, 1.0) if attention_factor is None else attention_factor,
        )

"""How a request's tokens are chosen: names and meanings of vLLM's `SamplingParams`."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams

NO_LIMIT = 2**31 - 1
"""Of max_tokens: longer than any context."""


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """The form of an answer: exactly one field, named as in vLLM."""

    json: str | dict[str, Any] | None = None
    """A JSON schema, as text or object."""
    regex: str | None = None
    """Matches the whole answer."""
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    """A context-free grammar in Lark or GBNF (`root ::= …`)."""
    json_object: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            msgspec.structs.force_setattr(self, "choice", tuple(self.choice))
        if self.json_object is False:
            msgspec.structs.force_setattr(self, "json_object", None)
        names = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        _check("structured_outputs", names, len(names) == 1, "must have exactly one of its fields")
        if self.choice is not None:
            ok = len(self.choice) > 0 and all(isinstance(text, str) and text for text in self.choice)
            _check("structured_outputs.choice", self.choice, ok, "must hold at least one text, none empty")

    @property
    def json_schema(self) -> str:
        """`json` as text, where it is set."""
        return self.json if isinstance(self.json, str) else json.dumps(self.json)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one request. Raises ConfigError. Randomness is a pure function of (seed, position)."""

    n: int = 1
    """Answers per prompt; choice i has seed + i."""
    max_tokens: int = 16
    """Most tokens to generate; None = up to max_model_len, where the engine always stops."""
    min_tokens: int = 0
    """Until then stop token ids and EOS are masked."""
    temperature: float = 1.0
    """In [0, 100]; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass, in (0, 1]."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 and -1 = all."""
    min_p: float = 0.0
    """Keep tokens min_p times as likely as the likeliest, in [0, 1]."""
    seed: int | None = None
    """64 bits; a request without one gets one before it reaches a lane."""
    stop: tuple[str, ...] = ()
    """End the answer; found in the detokenized text, not by the engine."""
    stop_token_ids: tuple[int, ...] = ()
    """End the answer, beside the model's EOS ids."""
    ignore_eos: bool = False
    """Go on past EOS ids; stop_token_ids still stop."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or stop token's text, in the answer."""
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    """Subtracted from the logits of the answer's tokens, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """The same, once per occurrence."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or answer; above 0, 1 = off."""
    logit_bias: dict[int, float] = {}
    """Added to these ids' logits; clipped to [-100, 100] as in vLLM."""
    allowed_token_ids: tuple[int, ...] | None = None
    """None = all."""
    bad_words: tuple[str, ...] = ()
    """Texts whose last token never follows their other tokens."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """`bad_words` tokenized, together with the prompt."""
    logprobs: int | None = None
    """For each generated token and this many likeliest ones, -1 = all; before penalties, masks and temperature."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; the prefix cache is then not read."""
    structured_outputs: StructuredOutputsParams | None = None
    pooling: PoolingParams | None = None
    """Set to get the prompt's vector; no token is generated."""

    def seed_of_choice(self, i: int) -> int | None:
        return None if self.seed is None else (self.seed + i) % 2**64

    def __post_init__(self) -> None:
        self._tidy()
        self._check("n", self.n >= 1, "must be at least 1")
        self._check("max_tokens", self.max_tokens >= 1, "must be at least 1")
        self._check("min_tokens", self.min_tokens >= 0, "must be at least 0")
        self._check("min_tokens", self.min_tokens <= self.max_tokens, f"must not exceed max_tokens={self.max_tokens}")
        is_finite = math.isfinite(self.temperature)
        self._check("temperature", is_finite and 0.0 <= self.temperature <= 100.0, "must be within [0, 100]")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "must be within (0, 1]")
        self._check("top_k", self.top_k >= -1, "must be at least 1, or 0 or -1 for off")
        self._check("min_p", 0.0 <= self.min_p <= 1.0, "must be within [0, 1]")
        self._check("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "must fit 64 bits")
        for text in self.stop:
            _check("stop", text, len(text) > 0, "must not hold an empty string")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -2.0 <= getattr(self, name) <= 2.0, "must be within [-2, 2]")
        is_positive = math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0
        self._check("repetition_penalty", is_positive, "must be above 0")
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias", {token_id: bias}, token_id >= 0 and not math.isnan(bias), "is no token id and bias")
        bounded = {token_id: max(-100.0, min(100.0, bias)) for token_id, bias in self.logit_bias.items()}
        msgspec.structs.force_setattr(self, "logit_bias", bounded)
        if self.allowed_token_ids is not None:
            ok = len(self.allowed_token_ids) > 0 and min(self.allowed_token_ids) >= 0
            self._check("allowed_token_ids", ok, "must hold at least one token id, none negative")
        for word in self.bad_words:
            self._check("bad_words", word.strip() != "", "must not hold an empty string")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            self._check(name, number is None or number >= -1, "must be at least 0, or -1 for all")

    def _check(self, field: str, ok: bool, reason: str) -> None:
        _check(field, getattr(self, field), ok, reason)

    def _tidy(self) -> None:
        """Convert lists, single strings and None, which vLLM accepts, to the fields' types."""
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, name, (value,))
            elif isinstance(value, list) or (value is None and name != "allowed_token_ids"):
                msgspec.structs.force_setattr(self, name, tuple(value or ()))
        if self.max_tokens is None:
            msgspec.structs.force_setattr(self, "max_tokens", NO_LIMIT)
        if self.logit_bias is None:
            msgspec.structs.force_setattr(self, "logit_bias", {})


def _check(field: str, value: object, ok: bool, reason: str) -> None:
    if not ok:
        raise ConfigError(field, value, reason)

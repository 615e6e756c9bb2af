"""How a request's tokens are chosen: names and meanings of vLLM's `SamplingParams`."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.vllm_params import VllmNames, by_position

NO_LIMIT = 2**31 - 1
"""Of max_tokens: longer than any context."""
MAX_N = 128
"""As OpenAI has it."""
MAX_STOPS = 64
MAX_BAD_WORDS = 1024
MAX_TEXT_CHARS = 1024
"""Of a stop string or bad word."""
MAX_CHOICES = 10_000

_MAX_ID = 2**31 - 1
INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, MAX_N),
    "max_tokens": (1, NO_LIMIT),
    "min_tokens": (0, NO_LIMIT),
    "top_k": (-1, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (-1, 2**31 - 1),
    "prompt_logprobs": (-1, 2**31 - 1),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
}
_WORDS = {str | dict: "a text or an object", str: "a text", bool: "true or false"}
_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")


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
            ok = isinstance(self.choice, tuple) and 0 < len(self.choice) <= MAX_CHOICES
            ok = ok and all(isinstance(text, str) and text for text in self.choice)
            _check("structured_outputs.choice", self.choice, ok, f"must hold 1 to {MAX_CHOICES} texts, none empty")
        kinds = {"json": str | dict, "regex": str, "grammar": str, "json_object": bool}
        for name, kind in kinds.items():
            value = getattr(self, name)
            _check(f"structured_outputs.{name}", value, isinstance(value, kind | None), f"must be {_WORDS[kind]}")

    @property
    def json_schema(self) -> str:
        """`json` as text, where it is set."""
        return self.json if isinstance(self.json, str) else json.dumps(self.json)


class SamplingParams(msgspec.Struct, kw_only=True, metaclass=VllmNames):
    """Settings of one request. Raises ConfigError. Randomness is a pure function of (seed, position).

    Fields may be assigned later; they are checked when the parameters are used (`clone`). Lists are kept as tuples.
    """

    n: int = 1
    """Answers per prompt, in [1, 128]; choice i has seed + i."""
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
    """Of int64; -1 = None, as in vLLM. A request without one gets one before it reaches a lane."""
    stop: tuple[str, ...] = ()
    """End the answer; found in the detokenized text, not by the engine. At most 64 of 1024 characters."""
    stop_token_ids: tuple[int, ...] = ()
    """End the answer, beside the model's EOS ids."""
    ignore_eos: bool = False
    """Go on past EOS ids; stop_token_ids still stop."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or stop token's text, in the answer."""
    skip_special_tokens: bool = True
    detokenize: bool = True
    """False leaves the text empty, for who wants token ids alone; not with `stop`."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of the answer's tokens, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """The same, once per occurrence."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or answer; in [0.01, 100], so that no logit up
    to 1e36 leaves float32; 1 = off."""
    logit_bias: dict[int, float] = {}
    """Added to these ids' logits; clipped to [-100, 100] as in vLLM."""
    allowed_token_ids: tuple[int, ...] | None = None
    """None = all."""
    bad_words: tuple[str, ...] = ()
    """Texts whose last token never follows their other tokens. At most 1024 of 1024 characters."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """`bad_words` tokenized, together with the prompt."""
    logprobs: int | None = None
    """For each generated token and this many likeliest ones, -1 = all; before penalties, masks and temperature."""
    logprob_token_ids: tuple[int, ...] | None = None
    """With logprobs: report these ids instead of the likeliest ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; the prefix cache is then not read."""
    structured_outputs: StructuredOutputsParams | None = None
    structured_outputs_after: tuple[int | None, str] | None = None
    """Where the form begins behind the answer's reasoning, set together with the prompt: the token that opens
    reasoning where the answer begins with it (None: it begins within), and the text that ends it."""
    pooling: PoolingParams | None = None
    """Set to get the prompt's vector; no token is generated."""

    @classmethod
    def from_optional(cls, *args: Any, **values: Any) -> SamplingParams:
        """None is a field's default (of max_tokens: no limit), and keys of logit_bias may be texts."""
        values = by_position(args, values)
        bias = values.get("logit_bias")
        if isinstance(bias, dict):
            values["logit_bias"] = {int(key) if str(key).isdecimal() else key: value for key, value in bias.items()}
        return cls(**{name: value for name, value in values.items() if value is not None or name == "max_tokens"})

    def clone(self) -> SamplingParams:
        """A copy that shares nothing that can change. Raises ConfigError where a field was assigned a wrong value."""
        return msgspec.structs.replace(self)

    def seed_of_choice(self, i: int) -> int | None:
        """Within [0, 2**63), so that it can be sent as a seed again."""
        return None if self.seed is None else (self.seed + i) % 2**63

    def __post_init__(self) -> None:
        self._tidy()
        for name in _SWITCHES:
            self._check(name, isinstance(getattr(self, name), bool), "must be true or false")
        for name, (least, most) in INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs", "prompt_logprobs"):
                self._check(name, _is_integer(value, least, most), f"must be an integer within [{least}, {most}]")
        self._check("min_tokens", self.min_tokens <= self.max_tokens, f"must not exceed max_tokens={self.max_tokens}")
        for name, bounds in NUMBERS.items():
            self._check(name, _is_number(getattr(self, name), *bounds), f"must be a number within {list(bounds)}")
        self._check("top_p", self.top_p > 0.0, "must be within (0, 1]")
        self._check_texts("stop", MAX_STOPS)
        self._check("detokenize", self.detokenize or not self.stop, "must be true where stop strings are looked for")
        self._check_texts("bad_words", MAX_BAD_WORDS)
        self._check_token_ids()
        self._bound_logit_bias()
        forms = {"structured_outputs": StructuredOutputsParams, "pooling": PoolingParams}
        for name, form in forms.items():
            self._check(name, isinstance(getattr(self, name), form | None), f"must be {form.__name__}")

        match self.structured_outputs_after:
            case None | (int() | None, str()):
                pass
            case _:
                self._check("structured_outputs_after", False, "must be a pair of a token id, or None, and a text")

    def _check(self, field: str, ok: bool, reason: str) -> None:
        _check(field, getattr(self, field), ok, reason)

    def _check_texts(self, name: str, most: int) -> None:
        texts = getattr(self, name)
        self._check(name, isinstance(texts, tuple), "must be a list of strings")
        _check(name, f"{len(texts)} strings", len(texts) <= most, f"must not hold more than {most}")
        for text in texts:
            ok = isinstance(text, str) and 0 < len(text) <= MAX_TEXT_CHARS and (name == "stop" or not text.isspace())
            _check(name, text, ok, f"must hold strings of 1 to {MAX_TEXT_CHARS} characters, not blank as bad words")

    def _check_ids(self, name: str, token_ids: object) -> None:
        _check(name, token_ids, isinstance(token_ids, tuple | list), "must be a list of token ids")
        assert isinstance(token_ids, tuple | list)
        for token_id in token_ids:
            _check(name, token_id, _is_integer(token_id, 0, _MAX_ID), f"must hold integers within [0, {_MAX_ID}]")

    def _check_token_ids(self) -> None:
        self._check_ids("stop_token_ids", self.stop_token_ids)
        for name in ("allowed_token_ids", "logprob_token_ids"):
            if getattr(self, name) is not None:
                self._check_ids(name, getattr(self, name))
                self._check(name, len(getattr(self, name)) > 0, "must hold at least one token id")
        words = self.bad_words_token_ids
        self._check("bad_words_token_ids", isinstance(words, tuple | list), "must be a list of words")
        for word in words:
            self._check_ids("bad_words_token_ids", word)
            self._check("bad_words_token_ids", len(word) > 0, "must not hold an empty word")

    def _bound_logit_bias(self) -> None:
        self._check("logit_bias", isinstance(self.logit_bias, dict), "must map token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            ok = _is_integer(token_id, 0, _MAX_ID) and _is_number(bias, -math.inf, math.inf)
            reason = f"must map token ids within [0, {_MAX_ID}] to numbers"
            _check("logit_bias", {token_id: bias}, ok, reason)
        bounded = {token_id: float(max(-100, min(100, bias))) for token_id, bias in self.logit_bias.items()}
        msgspec.structs.force_setattr(self, "logit_bias", bounded)

    def _tidy(self) -> None:
        """Convert lists, single strings and None, which vLLM accepts, to the fields' types."""
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logprob_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, name, (value,))
            elif isinstance(value, list) or (value is None and name in ("stop", "stop_token_ids", "bad_words")):
                msgspec.structs.force_setattr(self, name, tuple(value or ()))
        if self.max_tokens is None:
            msgspec.structs.force_setattr(self, "max_tokens", NO_LIMIT)
        if self.seed == -1:
            msgspec.structs.force_setattr(self, "seed", None)
        if self.logit_bias is None:
            msgspec.structs.force_setattr(self, "logit_bias", {})


def _is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object, least: float, most: float) -> bool:
    """NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _check(field: str, value: object, ok: bool, reason: str) -> None:
    if not ok:
        raise ConfigError(field, value, reason)

"""The parameters of vLLM's `SamplingParams` that are no fields of ours: which are accepted, and which are refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import msgspec

from stagemesh.config.base import did_you_mean
from stagemesh.config.errors import ConfigError

logger = logging.getLogger(__name__)

POSITIONS = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
)
"""vLLM's order, for parameters without a name."""


class RequestOutputKind(Enum):
    """When vLLM's engine returns results; `LLM` always returns the final ones."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


INERT: dict[str, tuple[Any, ...]] = {
    "extra_args": (None,),
    "flat_logprobs": (False,),
    "output_kind": tuple(RequestOutputKind),
    "routed_experts_prompt_start": (0,),
    "skip_clone": (False, True),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (None,),
}
"""About the form in which vLLM's engine hands results over: accepted, with the values that need no warning."""
REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "early_stopping": (None, False),
    "length_penalty": (None, 1.0),
    "logits_processors": (None,),
    "logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "prompt_logprob_token_ids": (None,),
    "repetition_detection": (None,),
    "skip_reading_prefix_cache": (None, False),
    "thinking_token_budget": (None, -1),
    "trace_decode_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
"""Would change the answer, with the values that do not."""
RENAMED = {"guided_decoding": "structured_outputs"}

_warned: set[str] = set()


class VllmNames(msgspec.StructMeta):
    """Makes a struct from vLLM's parameters, by name or by position. Raises ConfigError."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        if not args and values.keys() <= set(cls.__struct_fields__):
            return super().__call__(**values)  # the usual case, once per request
        return super().__call__(**_known(cls.__struct_fields__, by_position(args, values)))


def by_position(args: Sequence[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """All by name. Raises TypeError, as Python does."""
    if len(args) > len(POSITIONS):
        raise TypeError(f"at most {len(POSITIONS)} parameters may come without a name, not {len(args)}")
    named = dict(zip(POSITIONS, args, strict=False))
    if twice := named.keys() & values.keys():
        raise TypeError(f"got several values for {', '.join(sorted(twice))}")
    return named | dict(values)


def _known(fields: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for name, value in values.items():
        name = RENAMED.get(name, name)
        if name in fields:
            known[name] = value
        elif name in INERT:
            if value not in INERT[name] and name not in _warned:
                _warned.add(name)
                logger.warning("%s=%r has no effect here", name, value)
        elif name not in REFUSED:
            raise ConfigError(name, value, f"is not a sampling parameter{did_you_mean(name, fields)}")
        elif value not in REFUSED[name]:
            raise ConfigError(name, value, "is a sampling parameter of vLLM that does not exist here")
    return known

"""What a model can take. Each check raises ConfigError that names the field."""

from __future__ import annotations

from collections.abc import Collection

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.ingress.errors import PromptTooLong


def check_prompt(
    field: str, token_ids: Collection[int], *, vocab_size: int, max_model_len: int, room_for_answer: int
) -> None:
    """room_for_answer: tokens that must be left of max_model_len."""
    if not token_ids:
        raise ConfigError(field, list(token_ids), "has no tokens")
    check_token_ids(field, token_ids, vocab_size)
    if len(token_ids) + room_for_answer > max_model_len:
        reason = f"max_model_len is {max_model_len} tokens"
        if room_for_answer:
            reason += ", of which the answer needs at least one"
        raise PromptTooLong(field, f"{len(token_ids)} tokens", reason)


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """The token ids that a request names: one past the end would fail in the middle of a step, for everybody."""
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    check_token_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    check_token_ids("logit_bias", params.logit_bias, vocab_size)


def check_token_ids(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    for outermost in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= outermost < vocab_size:
            raise ConfigError(field, outermost, f"token ids must be within [0, {vocab_size})")

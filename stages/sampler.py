"""Choosing the next token of every sequence of a step.

Randomness is a pure function of (seed, position): one uniform number per row, and the token is where it falls in
the cumulative distribution, in token-id order, over the tokens that are kept. What a row gets does not depend on the
rows beside it.

Kept are the tokens whose logit reaches a threshold; the limits apply in vLLM's order, each to what the one before left:
temperature, min_p, top_k, top_p. Tokens that tie with the threshold are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stagemesh.stages.messages import SampleSpec

_MASK64 = 2**64 - 1
_NUCLEUS_CANDIDATES = 256
"""How many of the likeliest tokens are sorted first in search of a nucleus; nearly always enough."""


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token id per row of `logits` [n, vocab]; `specs` [n]. Overwrites banned entries of `logits`."""
    for row, spec in enumerate(specs):
        if spec.banned_token_ids:
            logits[row, spec.banned_token_ids] = -math.inf
    chosen = logits.argmax(-1)
    random_rows = [row for row, spec in enumerate(specs) if spec.temperature > 0.0]
    if random_rows:
        chosen[random_rows] = _draw(logits[random_rows], [specs[row] for row in random_rows])
    token_ids: list[int] = chosen.tolist()
    return token_ids


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for (seed, position): splitmix64's finalizer over both, 53 bits of it."""
    return (_mix(_mix(seed & _MASK64) + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """splitmix64 (https://prng.di.unimi.it/splitmix64.c)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """[n, vocab] → int64 [n]. In float64: rounding must not decide between a token and its neighbour."""
    temperatures = _column([spec.temperature for spec in specs], logits)
    # The likeliest token's logit becomes 0 before the division, so that a tiny temperature cannot overflow.
    scores = logits.double()
    scores = scores.sub_(scores.amax(-1, keepdim=True)).div_(temperatures)
    threshold = _threshold(scores, specs)
    weights = scores.exp()
    if threshold is not None:
        weights.masked_fill_(scores < threshold, 0.0)
    cumulative = weights.cumsum_(-1)
    total = cumulative[:, -1:]
    target = _column([uniform(spec.seed, spec.position) for spec in specs], logits) * total
    # Rounding may lift the target to the total, behind which there is no token.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _threshold(scores: Tensor, specs: Sequence[SampleSpec]) -> Tensor | None:
    """[n, 1]: the least score that is kept in each row; None when every row keeps everything."""
    threshold = None
    if any(spec.min_p > 0.0 for spec in specs):
        threshold = _column([math.log(s.min_p) if s.min_p > 0.0 else -math.inf for s in specs], scores)
    top_ks = [s.top_k if 0 < s.top_k < scores.shape[-1] else 0 for s in specs]
    if any(top_ks):
        best = scores.topk(max(top_ks), -1).values
        last = torch.tensor([[max(k - 1, 0)] for k in top_ks], device=scores.device)
        off = torch.tensor([[k == 0] for k in top_ks], device=scores.device)
        threshold = _greater(threshold, best.gather(-1, last).masked_fill_(off, -math.inf))
    if any(spec.top_p < 1.0 for spec in specs):
        threshold = _greater(threshold, _nucleus(scores, threshold, [s.top_p for s in specs]))
    return threshold


def _nucleus(scores: Tensor, threshold: Tensor | None, top_ps: Sequence[float]) -> Tensor:
    """[n, 1]: the least score within the smallest set of the likeliest tokens whose mass reaches top_p."""
    vocab_size = scores.shape[-1]
    kept = scores if threshold is None else scores.masked_fill(scores < threshold, -math.inf)
    # A running sum, because its rounding does not depend on how many rows there are.
    mass = kept.exp().cumsum_(-1)[:, -1:] * _column(top_ps, scores)
    num_candidates = min(_NUCLEUS_CANDIDATES, vocab_size)
    while True:
        best = kept.topk(num_candidates, -1).values
        reached = best.exp().cumsum_(-1)
        if num_candidates == vocab_size or bool((reached[:, -1:] >= mass).all()):
            break
        num_candidates = min(num_candidates * 8, vocab_size)
    # The last token of the nucleus is the first at which the sum reaches the mass.
    last = (reached < mass).sum(-1, keepdim=True).clamp_(max=num_candidates - 1)
    nucleus = best.gather(-1, last)
    off = torch.tensor([[p >= 1.0] for p in top_ps], device=scores.device)
    return nucleus.masked_fill_(off, -math.inf)


def _greater(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.maximum(a, b)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """float64 [n, 1] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]

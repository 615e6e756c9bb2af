"""Messages between a leader and its workers: step plans and results.

Integer arrays are little-endian int32 bytes, because decoding lists of ints is slow.
"""

from __future__ import annotations

import msgspec


class LogitsAdjustments(msgspec.Struct, array_like=True, frozen=True):
    """Changes to the logits of one token, in this order."""

    allowed: bytes = b""
    """One bit per token id, the lowest first in each byte; ids past its end are not allowed. Empty allows all."""
    bias_ids: bytes = b""
    """int32: token ids to whose logits `bias` (float32) is added."""
    bias: bytes = b""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    prompt_ids: bytes = b""
    """int32: distinct prompt token ids; empty without repetition_penalty."""
    output_ids: bytes = b""
    """int32: distinct output token ids; `output_counts` (int32): how often each."""
    output_counts: bytes = b""


class SampleSpec(msgspec.Struct, array_like=True, frozen=True):
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    """Unsigned 64-bit."""
    position: int
    """Of the sampled token; with `seed` it fixes the randomness."""
    banned_token_ids: list[int]
    """EOS and stop ids before min_tokens, endings of bad words."""
    edits: LogitsAdjustments | None = None
    num_logprobs: int | None = None
    """Likeliest tokens to report beside the chosen one; -1: all, None: no report."""
    logprob_token_ids: list[int] = []
    """Reported in place of the likeliest ones, if there are any."""


class PromptLogprobsSpec(msgspec.Struct, array_like=True, frozen=True):
    """Report how likely the prompt tokens after those of this step are."""

    sequence: int
    """Its index in the plan."""
    target_ids: bytes
    """int32: the tokens that follow the sequence's first ones in this step."""
    num_logprobs: int
    """As in SampleSpec."""


class PoolSpec(msgspec.Struct, array_like=True, frozen=True):
    """Make one vector of a prompt; in each of its steps."""

    sequence: int
    """Its index in the plan."""
    pooling: str
    """"last" or "mean"."""
    normalize: bool
    dimensions: int
    """Leading dimensions to keep; 0 for all."""
    is_whole: bool


class StepPlan(msgspec.Struct, array_like=True, tag="plan"):
    """One forward pass of S sequences, T tokens in all."""

    epoch: int
    step: int
    """From 0 in each epoch, one more per plan."""
    seq_ids: list[int]
    """[S]; fixed for a sequence's life in the lane."""
    query_lens: bytes
    """int32 [S]: tokens in this step."""
    context_lens: bytes
    """int32 [S]: tokens with KV in the cache before this step."""
    token_ids: bytes
    """int32 [T], in sequence order. A token's position is context_len + its offset in the query. -1 - i is the
    placeholder of the i-th token that step `placeholder_step` samples."""
    block_tables: bytes
    """int32 [S, max_blocks] row-major, -1 = unused."""
    max_blocks: int
    samples: list[SampleSpec | None]
    """[S]; None where the step ends inside the prompt, or the sequence is pooled."""
    prompt_logprobs: list[PromptLogprobsSpec] = []
    pools: list[PoolSpec] = []
    placeholder_step: int = -1
    """An earlier step; -1 without placeholders."""


NOT_FINITE, NOTHING_ALLOWED = -1, -2
"""In place of a sampled token: the logits are NaN or infinite; the request rules every token out."""


class SampledTokens(msgspec.Struct, array_like=True, tag="tokens"):
    """From rank 0 of the last stage to all ranks of stage 0, for placeholders."""

    epoch: int
    step: int
    token_ids: list[int]
    """As in StepResult."""


class StopRun(msgspec.Struct, array_like=True, tag="stop"):
    epoch: int


LEAST_LOGPROB = -9999.0
"""vLLM's, in place of minus infinity and of what is no number, neither of which JSON has."""


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Of one token: natural logarithms, before penalties, masks, temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top_ids: list[int]
    """The likeliest tokens, likeliest first."""
    top_logprobs: list[float]


class StepResult(msgspec.Struct, array_like=True, tag="result"):
    """From rank 0 of the last stage, one per plan, in plan order."""

    epoch: int
    step: int
    token_ids: list[int]
    """One per SampleSpec of the plan; NOT_FINITE or NOTHING_ALLOWED where no token can be sampled."""
    logprobs: list[TokenLogprobs | None] = []
    """One per token id, None where not wanted; empty if no request wants them."""
    prompt_logprobs: list[list[TokenLogprobs]] = []
    """One list per PromptLogprobsSpec of the plan."""
    pooled: list[bytes] = []
    """float32: one vector per PoolSpec of the plan whose prompt is whole; empty where it would not be finite."""


class WorkerStats(msgspec.Struct, array_like=True, tag="stats"):
    """From rank 0 of each stage, about once a second under load: of the time since the last one."""

    epoch: int
    stage: int
    spans: list[tuple[float, float]]
    """Start and end (`time.time()`) of each step inside the model: layers, and sampling on the last stage."""
    expert_tokens: list[int] = []
    """[E]: tokens of each expert, summed over steps and MoE layers, each token once per layer for each of its top k;
    empty for a dense model."""
    expert_imbalance: list[float] = []
    """Per MoE layer, in the last step: the busiest expert's tokens over the mean; 1 is even."""


class StepFailure(msgspec.Struct, array_like=True, tag="failure"):
    """From a rank whose own work in a step raised, not from one that lost a peer. It leaves its run loop afterwards."""

    epoch: int
    step: int
    stage: int
    tp_rank: int
    error: str
    """Type and message."""


WorkerMessage = StepResult | WorkerStats | StepFailure
LeaderMessage = StepPlan | StopRun
ToWorker = LeaderMessage | SampledTokens

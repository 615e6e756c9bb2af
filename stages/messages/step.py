"""What travels between a leader and the workers of its lane: step plans and results.

Integer arrays are little-endian int32 bytes for `numpy.frombuffer`, because decoding lists of ints takes too long.
"""

from __future__ import annotations

import msgspec


class LogitsAdjustments(msgspec.Struct, array_like=True, frozen=True):
    """What a request changes about the logits of one token, in this order."""

    allowed: bytes = b""
    """One bit per token id, the lowest first in each byte; ids past its end are not allowed. Empty allows all."""
    bias_ids: bytes = b""
    """int32: token ids whose logits `bias` (float32, as many) is added to."""
    bias: bytes = b""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    prompt_ids: bytes = b""
    """int32: distinct token ids of the prompt; empty unless repetition_penalty needs them."""
    output_ids: bytes = b""
    """int32: distinct token ids generated so far; `output_counts` (int32) says how often each."""
    output_counts: bytes = b""


class SampleSpec(msgspec.Struct, array_like=True, frozen=True):
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    """Unsigned 64-bit."""
    position: int
    """Of the token to be sampled; with `seed` it fixes the randomness."""
    banned_token_ids: list[int]
    """Never chosen in this step: EOS and stop ids before min_tokens, endings of bad words."""
    edits: LogitsAdjustments | None = None
    num_logprobs: int | None = None
    """Likeliest tokens to report beside the chosen one; -1 for all, None for no report."""


class PromptLogprobsSpec(msgspec.Struct, array_like=True, frozen=True):
    """Report how likely the model found the prompt tokens that follow those of this step."""

    sequence: int
    """Its index in the plan."""
    target_ids: bytes
    """int32: the token that follows each of the sequence's first tokens in this step."""
    num_logprobs: int
    """As in SampleSpec."""


class PoolSpec(msgspec.Struct, array_like=True, frozen=True):
    """Make one vector of a prompt; in every step of that prompt."""

    sequence: int
    """Its index in the plan."""
    pooling: str
    """"last" or "mean"."""
    normalize: bool
    dimensions: int
    """Leading dimensions to keep; 0 for all."""
    is_whole: bool


class StepPlan(msgspec.Struct, array_like=True, tag="plan"):
    """One forward pass for every worker of a lane. S sequences, T tokens in all."""

    epoch: int
    step: int
    """Rises by one per plan within an epoch."""
    seq_ids: list[int]
    """[S]; each number is a sequence's for its life in the lane."""
    query_lens: bytes
    """int32 [S]: tokens of each sequence in this step; sums to T."""
    context_lens: bytes
    """int32 [S]: tokens whose KV is in the cache before this step."""
    token_ids: bytes
    """int32 [T], flattened in sequence order. Position of a token = context_len + offset in its query.
    -1 - i is the placeholder of the i-th token that step `placeholder_step` samples."""
    block_tables: bytes
    """int32 [S, max_blocks] row-major, -1 = unused."""
    max_blocks: int
    samples: list[SampleSpec | None]
    """[S]; None where no token is sampled: the step ends inside the prompt, or the sequence is pooled."""
    prompt_logprobs: list[PromptLogprobsSpec] = []
    pools: list[PoolSpec] = []
    placeholder_step: int = -1
    """An earlier step, or -1 where token_ids has no placeholders."""


class SampledTokens(msgspec.Struct, array_like=True, tag="tokens"):
    """From rank 0 of the last stage straight to the ranks of stage 0, which fill placeholders with them."""

    epoch: int
    step: int
    token_ids: list[int]
    """As in StepResult."""


class StopRun(msgspec.Struct, array_like=True, tag="stop"):
    epoch: int


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """How likely the model itself found one token: natural logarithms, before penalties, masks, temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top_ids: list[int]
    """The likeliest tokens, falling, as many as were asked for."""
    top_logprobs: list[float]


class StepResult(msgspec.Struct, array_like=True, tag="result"):
    """From rank 0 of the last stage, one per plan, in plan order."""

    epoch: int
    step: int
    token_ids: list[int]
    """One per sequence of the plan that had a SampleSpec, in plan order."""
    logprobs: list[TokenLogprobs | None] = []
    """As long as token_ids, None where the request did not ask; empty where no request did."""
    prompt_logprobs: list[list[TokenLogprobs]] = []
    """One list per PromptLogprobsSpec of the plan."""
    pooled: list[bytes] = []
    """float32: one vector per PoolSpec of the plan whose prompt is whole."""


class WorkerStats(msgspec.Struct, array_like=True, tag="stats"):
    """From rank 0 of each stage, about once a second under load: what happened since the last one."""

    epoch: int
    stage: int
    spans: list[tuple[float, float]]
    """Start and end (`time.time()`) of each step inside the model: its layers, and sampling on the last stage."""
    expert_tokens: list[int] = []
    """[E]: tokens of each expert, summed over steps and the stage's MoE layers; empty for a dense model. A token counts
    once per layer for each of its top k."""
    expert_imbalance: list[float] = []
    """One per MoE layer of the stage, in the last step: its busiest expert's tokens over the mean; 1 is even."""


WorkerMessage = StepResult | WorkerStats
LeaderMessage = StepPlan | StopRun
ToWorker = LeaderMessage | SampledTokens

"""OpenAI's responses, in msgspec, which encodes fast."""

from __future__ import annotations

import msgspec


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    """From the prefix cache."""


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    """Once per prompt, whatever n is."""
    completion_tokens: int
    """Of all choices, EOS and stop tokens included."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails(0)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """One entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The chosen token first, then the likeliest ones."""
    text_offset: list[int]
    """Characters of the text before each token."""


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob, frozen=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None
    """1 for the likeliest."""
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""vLLM's shape: per prompt token itself and the likeliest ones, by token id; null for the first."""


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str
    """JSON text."""


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: FunctionCall
    type: str = "function"


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None
    seed: int
    """With it, n=1 and the same system_fingerprint, the same request gives this answer again."""
    stop_reason: int | str | None = None
    """The stop string or one of stop_token_ids; None for EOS and "length"."""
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """If requested, as the fields below."""
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    """Of all else that an answer depends on: configuration, code and checkpoint."""
    object: str = "text_completion"
    service_tier: None = None
    """Always null, for clients that read vLLM's attributes; as the next one."""
    kv_transfer_params: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str | None
    """None where there are only tool calls or reasoning."""
    role: str = "assistant"
    reasoning: str | None = None
    """What the model thought, if the server tells it from the answer."""
    reasoning_content: str | None = None
    """The same, for older clients."""
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AssistantMessage
    finish_reason: str | None
    seed: int
    """As in CompletionChoice."""
    stop_reason: int | str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatResponse(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    """As in CompletionResponse."""
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    service_tier: None = None
    kv_transfer_params: None = None


class ModelPermission(msgspec.Struct, frozen=True):
    """Everything that a model is used for here; OpenAI's old form, which vLLM keeps."""

    id: str
    created: int
    object: str = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    created: int
    """Unix seconds: the start of this router."""
    max_model_len: int
    root: str
    """The model as its server names it: a folder or a hub id."""
    permission: list[ModelPermission]
    parent: None = None
    owned_by: str = "stagemesh"
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"

"""OpenAI's requests for text, in pydantic, and their SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import MAX_N, NO_LIMIT, SamplingParams, StructuredOutputsParams
from stagemesh.deployments.openai.schema import OpenAIRequest, one_or_many
from stagemesh.stages.text.input import ChatInput

MAX_ANSWERS = 256
"""Prompts times n of one request."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
"""Per token, as vLLM's `max_logprobs` and OpenAI have it."""
MAX_BAD_WORDS = 128
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's and vLLM's, whatever the model's own default is."""
_SAMPLING_FIELDS = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "prompt_logprobs",
)


class StreamOptions(pydantic.BaseModel, strict=True, extra="forbid"):
    include_usage: bool | None = None
    """End the stream with a chunk of usage."""
    include_obfuscation: bool | None = None
    """Padding against traffic analysis; accepted, not done."""


class JsonSchemaFormat(pydantic.BaseModel, strict=True, extra="forbid"):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = pydantic.Field(default=None, alias="schema")
    """None: any object."""
    strict: bool | None = None
    """The schema is enforced either way."""


class ResponseFormat(pydantic.BaseModel, strict=True, extra="forbid"):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(pydantic.BaseModel, strict=True, extra="forbid"):
    """vLLM's field; see `config.sampling.StructuredOutputsParams`."""

    json_: str | dict[str, Any] | None = pydantic.Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class InferenceRequest(OpenAIRequest):
    """What completions and chat share."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """By token id as a string."""
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    """vLLM's: of prompt and response, beside their text."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def _check(self) -> None:
        super()._check()
        if self.stream_options is not None and not self.stream:
            raise ConfigError("stream_options", "given", "is only allowed with stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ConfigError("prompt_logprobs", self.prompt_logprobs, "is not allowed with stream=true")
        _check_range("n", self.n, 1, MAX_N)
        _check_range("logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_count("stop", self.stops, MAX_STOPS, "strings")
        _check_count("bad_words", self.bad_words or (), MAX_BAD_WORDS, "words")
        for text in self.stops:
            if len(text) > MAX_STOP_CHARS:
                raise ConfigError("stop", text, f"must not be longer than {MAX_STOP_CHARS} characters")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report per generated one; None for no report."""
        raise NotImplementedError

    @property
    def num_chars(self) -> int:
        """Of the text to tokenize."""
        raise NotImplementedError

    @property
    def structured_outputs_name(self) -> str:
        """The field in use, for error messages."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format.json_schema"

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """defaults: for fields that the request leaves out. Raises ConfigError."""
        own = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        for key in self.logit_bias or ():
            if not key.isdecimal():
                raise ConfigError("logit_bias", key, "its keys must be token ids")
        return SamplingParams(
            **{**defaults, **own, "max_tokens": self._max_tokens(defaults)},
            n=self.n or 1,
            seed=self.seed,
            stop=tuple(self.stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            # OpenAI's clients write an empty list for no restriction.
            allowed_token_ids=tuple(self.allowed_token_ids) if self.allowed_token_ids else None,
            bad_words=tuple(self.bad_words or ()),
            logprobs=self.num_logprobs,
            structured_outputs=self._structured_outputs_params(),
        )

    def _max_tokens(self, defaults: Mapping[str, Any]) -> int:
        raise NotImplementedError

    def _structured_outputs_params(self) -> StructuredOutputsParams | None:
        structured, format = self.structured_outputs, self.response_format
        if format is None or format.type == "text":
            return None if structured is None else StructuredOutputsParams(**structured.model_dump(by_alias=True))
        if structured is not None:
            raise ConfigError("response_format", format.type, "must not be given together with structured_outputs")
        if format.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if format.json_schema is None:
            raise ConfigError("response_format.json_schema", None, "is required")
        schema = format.json_schema.json_schema
        return StructuredOutputsParams(json={"type": "object"} if schema is None else schema)


class CompletionRequest(InferenceRequest):
    prompt: Any
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    add_special_tokens: bool | None = None
    """To text prompts (BOS); default true."""
    logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_chars(self) -> int:
        return sum(len(prompt) for prompt in self.prompts() if isinstance(prompt, str))

    def _max_tokens(self, defaults: Mapping[str, Any]) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> Sequence[str | list[int]]:
        """All of one kind. Raises ConfigError."""
        prompts = one_or_many("prompt", self.prompt)
        if len(prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ConfigError("prompt", len(prompts), f"prompts times n={self.n} must not exceed {MAX_ANSWERS}")
        return prompts


class TextPart(pydantic.BaseModel, strict=True, extra="ignore"):
    type: Literal["text"]
    text: str


class ChatMessage(pydantic.BaseModel, strict=True, extra="allow"):
    """The chat template decides which roles exist, and also gets the extra fields."""

    role: str
    content: str | list[TextPart] | None = None

    @property
    def num_chars(self) -> int:
        return len(self.content) if isinstance(self.content, str) else sum(len(p.text) for p in self.content or ())


class FunctionTool(pydantic.BaseModel, strict=True, extra="ignore"):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema; None for no arguments."""
    strict: bool | None = None


class Tool(pydantic.BaseModel, strict=True, extra="ignore"):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(pydantic.BaseModel, strict=True, extra="ignore"):
    name: str


class NamedTool(pydantic.BaseModel, strict=True, extra="ignore"):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(InferenceRequest):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    """The newer name of max_tokens, and wins over it."""
    add_generation_prompt: bool | None = None
    """Whether the template opens the assistant's turn; default true."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables, e.g. {"enable_thinking": false}."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Default: auto if there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether a choice may hold several calls; default true."""

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("top_logprobs", self.top_logprobs, "needs logprobs=true")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_chars(self) -> int:
        return sum(message.num_chars for message in self.messages)

    def _max_tokens(self, defaults: Mapping[str, Any]) -> int:
        if self.max_completion_tokens is not None:
            if self.max_completion_tokens < 1:
                raise ConfigError("max_completion_tokens", self.max_completion_tokens, "must be at least 1")
            return self.max_completion_tokens
        max_tokens: int = defaults.get("max_tokens", NO_LIMIT)  # all that fits
        return max_tokens if self.max_tokens is None else self.max_tokens

    def chat_input(self) -> ChatInput:
        choice = self.tool_choice
        return ChatInput(
            messages=[message.model_dump() for message in self.messages],
            tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            tool_choice=choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            add_generation_prompt=self.add_generation_prompt is not False,
            template_variables=self.chat_template_kwargs or {},
        )


def _check_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise ConfigError(name, value, f"must be within [{least}, {most}]")


def _check_count(name: str, values: Sequence[str], most: int, what: str) -> None:
    if len(values) > most:
        raise ConfigError(name, len(values), f"must not hold more than {most} {what}")

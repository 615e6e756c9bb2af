"""OpenAI's requests for text, in pydantic, and their SamplingParams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import MAX_N, NO_LIMIT, SamplingParams
from stagemesh.deployments.openai.conversation import AllowedTools, Conversation, NamedTool, Tool
from stagemesh.deployments.openai.schema import (
    TEXTS_OR_TOKENS,
    Count,
    Float,
    Int,
    OpenAIRequest,
    check_range,
    one_or_many,
    raise_all,
)
from stagemesh.deployments.openai.structured import ResponseFormat, StructuredOutputs, structured_outputs_params
from stagemesh.stages.text.input import ChatInput, Truncation

MAX_ANSWERS = 1024
"""Prompts times n of one request."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
"""Per token, the default of vLLM's `max_logprobs`; OpenAI's limit."""
MAX_NAMED_LOGPROBS = 1024
MAX_BAD_WORDS = 128
MAX_SALT_CHARS = 128
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


class StreamOptions(pydantic.BaseModel, extra="allow"):
    include_usage: bool | None = None
    """End the stream with a chunk of usage."""
    continuous_usage_stats: bool | None = None
    """vLLM's, with include_usage: the usage of the choice so far in every chunk."""
    include_obfuscation: bool | None = None
    """Padding against traffic analysis; accepted, not done."""


class InferenceRequest(OpenAIRequest):
    """What completions and chat share."""

    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    seed: Int | None = pydantic.Field(default=None, ge=-(2**63), le=2**63 - 1)
    """-1: none, as in vLLM."""
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    logit_bias: dict[str, Float] | None = None
    """By token id as a string."""
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Count | None = None
    logprob_token_ids: list[Int] | None = None
    """vLLM's, with logprobs: report these ids instead of the likeliest ones."""
    return_token_ids: bool | None = None
    """vLLM's: of prompt and response, beside their text."""
    return_tokens_as_token_ids: bool | None = None
    """vLLM's: "token_id:N" in place of a token's text in logprobs."""
    echo: bool | None = None
    """Put the prompt before each answer; of a chat, its last message if the assistant wrote that."""
    truncate_prompt_tokens: Int | None = None
    """vLLM's: most prompt tokens to keep; -1: what fits."""
    truncation_side: Literal["left", "right"] | None = None
    """vLLM's: left keeps the last tokens, the default."""
    cache_salt: str | None = pydantic.Field(default=None, min_length=1, max_length=MAX_SALT_CHARS)
    """vLLM's: only requests of the same salt share the prefix cache."""
    use_beam_search: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    n: Int | None = None
    best_of: Int | None = None
    """Not above n."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def _check(self) -> None:
        super()._check()
        raise_all(self._problems())

    def _problems(self) -> Iterator[ConfigError]:
        if self.stream_options is not None and self.stream_options.model_dump(exclude_unset=True) and not self.stream:
            yield ConfigError("stream_options", "given", "is only allowed with stream=true")
        if self.prompt_logprobs and self.stream:
            yield ConfigError("prompt_logprobs", self.prompt_logprobs, "is not allowed with stream=true")
        if self.use_beam_search:
            yield ConfigError("use_beam_search", True, "beam search is not supported; sample n answers instead")
        yield from check_range("n", self.n, 1, MAX_N)
        if self.best_of not in (None, self.n or 1):
            yield ConfigError("best_of", self.best_of, f"must be n={self.n or 1}: no more answers are generated")
        yield from _check_count("stop", self.stops, MAX_STOPS, "strings")
        yield from _check_count("bad_words", self.bad_words or (), MAX_BAD_WORDS, "words")
        for text in self.stops:
            if len(text) > MAX_STOP_CHARS:
                yield ConfigError("stop", text, f"must not be longer than {MAX_STOP_CHARS} characters")
        for key in self.logit_bias or ():
            if not key.isdecimal():
                yield ConfigError("logit_bias", key, "its keys must be token ids")
        if self.logprob_token_ids is not None:
            yield from _check_count("logprob_token_ids", self.logprob_token_ids, MAX_NAMED_LOGPROBS, "ids")
            if not self.logprob_token_ids or self.num_logprobs is None:
                yield ConfigError("logprob_token_ids", self.logprob_token_ids, "needs an id, and logprobs to be set")
            if self.echoes_alone:
                yield ConfigError("logprob_token_ids", self.logprob_token_ids, "needs an answer: max_tokens is 0")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report per generated one; None for no report."""
        raise NotImplementedError

    logprobs_name: ClassVar[str] = "logprobs"
    """The field of `num_logprobs`."""
    echoes_a_message: ClassVar[bool] = False
    """Whether `echo` means a message and not the prompt."""

    @property
    def num_chars(self) -> int:
        """Of the text to tokenize."""
        raise NotImplementedError

    @property
    def structured_outputs_name(self) -> str:
        """The field in use, for error messages."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        is_tag = self.response_format is not None and self.response_format.type == "structural_tag"
        return "response_format.structures" if is_tag else "response_format.json_schema"

    @property
    def echoes_alone(self) -> bool:
        """Whether the prompt is the whole answer."""
        return False

    @property
    def truncation(self) -> Truncation | None:
        if self.truncate_prompt_tokens is None:
            return None
        return Truncation(num_tokens=self.truncate_prompt_tokens, side=self.truncation_side or "left")

    def sampling_params(self, defaults: Mapping[str, Any], max_logprobs: int = MAX_LOGPROBS) -> SamplingParams:
        """defaults: for fields that the request leaves out. max_logprobs: -1 = no limit. Raises ConfigError."""
        own = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        reports = {"prompt_logprobs": self.prompt_logprobs, self.logprobs_name: self.num_logprobs}
        for name, count in reports.items():
            most = NO_LIMIT if max_logprobs == -1 else max_logprobs
            if count is not None and not (-1 if max_logprobs == -1 else 0) <= count <= most:
                reason = f"must be within [0, {max_logprobs}], the server's max_logprobs"
                raise ConfigError(name, count, reason if max_logprobs != -1 else "must be at least -1")
        if self.echo and self.prompt_logprobs is None and not (self.stream and self.echoes_a_message):
            own["prompt_logprobs"] = self.num_logprobs
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
            logprob_token_ids=tuple(self.logprob_token_ids) if self.logprob_token_ids else None,
            structured_outputs=structured_outputs_params(self.structured_outputs, self.response_format),
        )

    def _max_tokens(self, defaults: Mapping[str, Any]) -> int:
        raise NotImplementedError


class CompletionRequest(InferenceRequest):
    prompt: Annotated[Any, pydantic.WithJsonSchema(TEXTS_OR_TOKENS)]
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    add_special_tokens: bool | None = None
    """To text prompts (BOS); default true."""
    logprobs: Count | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_chars(self) -> int:
        return sum(len(prompt) for prompt in self.prompts() if isinstance(prompt, str))

    def _max_tokens(self, defaults: Mapping[str, Any]) -> int:
        if self.echoes_alone:
            return 1  # the least that a lane generates; not shown
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def echoes_alone(self) -> bool:
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> Sequence[str | list[int]]:
        """All of one kind. Raises ConfigError."""
        prompts = one_or_many("prompt", self.prompt)
        if len(prompts) * (self.n or 1) > MAX_ANSWERS:
            raise ConfigError("prompt", len(prompts), f"prompts times n={self.n} must not exceed {MAX_ANSWERS}")
        return prompts


class ChatRequest(Conversation, InferenceRequest):
    logprobs_name = "top_logprobs"
    echoes_a_message = True
    max_completion_tokens: Int | None = None
    """The newer name of max_tokens, and wins over it."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """For the template; it also sets the variable enable_thinking, unless chat_template_kwargs does."""
    include_reasoning: bool | None = None
    """vLLM's; default true."""
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    """Default: auto if there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether a choice may hold several calls; default true."""

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def _problems(self) -> Iterator[ConfigError]:
        yield from super()._problems()
        if self.top_logprobs and not self.logprobs:
            yield ConfigError("top_logprobs", self.top_logprobs, "needs logprobs=true")

    @property
    def num_chars(self) -> int:
        return sum(message.num_chars for message in self.messages)

    @property
    def echoed_message(self) -> str:
        """What `echo` puts before the answer: the last message, if the assistant wrote it."""
        last = self.messages[-1]
        return last.text if self.echo and last.role == "assistant" else ""

    def _max_tokens(self, defaults: Mapping[str, Any]) -> int:
        if self.max_completion_tokens is not None:
            if self.max_completion_tokens < 1:
                raise ConfigError("max_completion_tokens", self.max_completion_tokens, "must be at least 1")
            return self.max_completion_tokens
        max_tokens: int = defaults.get("max_tokens", NO_LIMIT)  # all that fits
        return max_tokens if self.max_tokens is None else self.max_tokens

    def chat_input(self) -> ChatInput:
        choice = self.tool_choice
        variables: dict[str, Any] = {}
        if (effort := self.reasoning_effort) is not None:
            variables["reasoning_effort"] = effort
            if "enable_thinking" not in (self.chat_template_kwargs or {}):
                variables["enable_thinking"] = effort != "none"
        return self.conversation(
            variables,
            tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            tool_choice=choice.model_dump() if isinstance(choice, NamedTool | AllowedTools) else choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            include_reasoning=self.include_reasoning is not False,
        )


def _check_count(name: str, values: Sequence[Any], most: int, what: str) -> Iterator[ConfigError]:
    if len(values) > most:
        yield ConfigError(name, len(values), f"must not hold more than {most} {what}")

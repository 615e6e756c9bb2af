"""Prompts in: text, token ids or a conversation become EngineRequests, for HTTP, gRPC and `LLM`.

An answer is a pure function of its EngineRequest, seed included. ConfigErrors name the field as the user wrote it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import msgspec

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams, StructuredOutputsParams
from stagemesh.stages.engine import grammar
from stagemesh.stages.messages.request import EngineRequest
from stagemesh.stages.text.reasoning import ReasoningParser, reasoning_named
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_formats import format_named
from stagemesh.stages.text.tool_use import MakeToolParser, ToolUse, tool_use

MAX_PRIORITY = 100
"""Either side of 0."""

Prompt = str | Sequence[int]


class PromptTooLong(ConfigError):
    """No room for an answer within max_model_len."""


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Cut prompts that are too long; vLLM's `truncate_prompt_tokens` and `truncation_side`."""

    num_tokens: int
    """Most to keep; -1: what fits with the answer."""
    side: Literal["left", "right"] = "left"
    """Where to cut: left keeps the last tokens."""


@dataclass(frozen=True, kw_only=True)
class ChatInput:
    """A conversation, in OpenAI's words."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    """[{"type": "function", "function": {"name", "description", "parameters"}}]"""
    tool_choice: str | Mapping[str, Any] | None = None
    """ "none", "auto", "required", {"type": "function", "function": {"name"}} or OpenAI's allowed_tools; None: the
    model sees the tools, its calls stay text."""
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Leave the last message open: the answer goes on behind its content. Not with add_generation_prompt."""
    add_special_tokens: bool = False
    """Templates write the special tokens themselves."""
    chat_template: str | None = None
    """Jinja, in place of the model's. It may compute without end: only from clients that are trusted."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    include_reasoning: bool = True
    """Else what the model thought is dropped."""


@dataclass(frozen=True, kw_only=True)
class ProcessedPrompt:
    text: str | None
    """None for token ids, and where it may have been cut."""
    token_ids: list[int]
    requests: list[EngineRequest]
    """One per choice."""
    make_tool_parser: MakeToolParser | None = None
    """Makes one per choice, where the answer may hold calls."""
    make_reasoning_parser: Callable[[], ReasoningParser] | None = None
    """The same, where it may hold reasoning."""
    shown_special_tokens: tuple[str, ...] = ()
    """Part of the text even where special tokens are skipped: parsers need them."""


class InputProcessor:
    """Any thread may use it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_model_len: int,
        seed: int | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        """seed: fixes the seeds drawn for requests without one. The parsers: see EngineArgs."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seeds = random.Random(seed)
        self._tool_format = None if tool_call_parser is None else format_named(tool_call_parser)
        self._reasoning = None if reasoning_parser is None else reasoning_named(reasoning_parser)

    def process_prompts(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str,
        *,
        name: str = "prompt",
        add_special_tokens: bool = True,
        structured_outputs_name: str = "structured_outputs",
        priority: int = 0,
        truncation: Truncation | None = None,
    ) -> list[ProcessedPrompt]:
        """Process all or none. name, structured_outputs_name: the user's names of the fields."""
        _check_priority(priority)
        params = self._resolve(params, structured_outputs_name)
        all_token_ids = self._tokenize(prompts, name, add_special_tokens, 1, self._cut(truncation, params.max_tokens))
        processed: list[ProcessedPrompt] = []
        for prompt, token_ids in zip(prompts, all_token_ids, strict=True):
            text = prompt if isinstance(prompt, str) and truncation is None else None
            requests = self._requests(token_ids, params, request_id, len(processed) * params.n, priority)
            processed.append(ProcessedPrompt(text=text, token_ids=token_ids, requests=requests))
        return processed

    def process_chat(
        self,
        chat: ChatInput,
        params: SamplingParams,
        request_id: str,
        *,
        structured_outputs_name: str = "structured_outputs",
        priority: int = 0,
        truncation: Truncation | None = None,
    ) -> ProcessedPrompt:
        _check_priority(priority)
        use = self._tool_use(chat)
        if use.schema is not None:
            if params.structured_outputs is not None:
                raise ConfigError("tool_choice", chat.tool_choice, "leaves no room for another form of the answer")
            params = msgspec.structs.replace(params, structured_outputs=StructuredOutputsParams(json=use.schema))
            structured_outputs_name = "tools"
        params = self._resolve(params, structured_outputs_name)
        text = self.render(chat, use)
        make_reasoning_parser = self._reasoning_of(chat, text)
        if make_reasoning_parser is not None and params.structured_outputs is not None:
            after = self._end_of(make_reasoning_parser())
            params = msgspec.structs.replace(params, structured_outputs_after=after)
        cut = self._cut(truncation, params.max_tokens)
        (token_ids,) = self._tokenize([text], "messages", chat.add_special_tokens, 1, cut)
        marks = () if make_reasoning_parser is None else make_reasoning_parser().marks
        return ProcessedPrompt(
            text=text,
            token_ids=token_ids,
            requests=self._requests(token_ids, params, request_id, 0, priority),
            make_tool_parser=use.make_parser,
            make_reasoning_parser=make_reasoning_parser,
            shown_special_tokens=(*use.special_tokens, *marks),
        )

    def render(self, chat: ChatInput, use: ToolUse | None = None) -> str:
        """The conversation as the template writes it. use: the tools that the model sees."""
        use = use or ToolUse()
        if not chat.messages:
            raise ConfigError("messages", [], "must hold at least one message")
        if chat.continue_final_message and chat.add_generation_prompt:
            # vLLM's words: clients look for them.
            reason = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
            raise ConfigError("continue_final_message", True, reason)
        variables: dict[str, Any] = {"add_generation_prompt": chat.add_generation_prompt, **chat.template_variables}
        if use.tools:
            variables["tools"] = use.tools
        messages = [_normalized(i, message) for i, message in enumerate(chat.messages)]
        render = partial(self._tokenizer.render_chat, variables=variables, own=chat.chat_template)
        if not use.description:
            text = render(messages)
        else:
            try:
                text = render(use.plain_messages(messages))
            except ConfigError:  # some templates refuse a system's message
                text = render(use.plain_messages(messages, as_user=True))
        return _cut_behind(text, messages[-1]["content"]) if chat.continue_final_message else text

    def process_embeddings(
        self,
        prompts: Sequence[Prompt],
        pooling: PoolingParams,
        request_id: str,
        *,
        name: str = "input",
        add_special_tokens: bool = True,
        priority: int = 0,
        truncation: Truncation | None = None,
    ) -> list[EngineRequest]:
        """One request per prompt, for its vector."""
        _check_priority(priority)
        params = SamplingParams(max_tokens=1, temperature=0.0, seed=0, pooling=pooling)
        all_token_ids = self._tokenize(prompts, name, add_special_tokens, 0, self._cut(truncation, 0))
        return [
            EngineRequest(f"{request_id}-{i}", token_ids, params, priority=priority)
            for i, token_ids in enumerate(all_token_ids)
        ]

    def _cut(self, truncation: Truncation | None, max_tokens: int) -> slice:
        """Which tokens of a prompt to keep. max_tokens: of the answer."""
        if truncation is None:
            return slice(None)
        most, name = truncation.num_tokens, "truncate_prompt_tokens"
        if not -1 <= most <= self._max_model_len:
            raise ConfigError(name, most, f"must be within [-1, {self._max_model_len}], the model's context length")
        if most == -1:
            # An answer without a limit of its own needs one token at least.
            most = self._max_model_len - (max_tokens if max_tokens < self._max_model_len else 1)
        return slice(most) if truncation.side == "right" or most == 0 else slice(-most, None)

    def _tokenize(
        self, prompts: Sequence[Prompt], name: str, add_special_tokens: bool, room_for_answer: int, cut: slice
    ) -> list[list[int]]:
        all_token_ids = []
        for i, prompt in enumerate(prompts):
            field = name if len(prompts) == 1 else f"{name}[{i}]"
            if not prompt:
                raise ConfigError(field, prompt, "must not be empty")
            if isinstance(prompt, str):
                if cut == slice(None) and len(prompt) > self._max_model_len * self._tokenizer.max_token_chars:
                    raise self._too_long(field, f"{len(prompt)} characters", room_for_answer)  # saves seconds
                token_ids = self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            else:
                token_ids = list(prompt)
            token_ids = token_ids[cut]
            self._check_prompt(field, token_ids, room_for_answer)
            all_token_ids.append(token_ids)
        return all_token_ids

    def _check_prompt(self, name: str, token_ids: Collection[int], room_for_answer: int) -> None:
        if not token_ids:
            raise ConfigError(name, [], "has no tokens")
        self._check_token_ids(name, token_ids)
        if len(token_ids) + room_for_answer > self._max_model_len:
            raise self._too_long(name, f"{len(token_ids)} tokens", room_for_answer)

    def _too_long(self, name: str, length: str, room_for_answer: int) -> PromptTooLong:
        # OpenAI's words: clients look for them.
        reason = f"this model's maximum context length is {self._max_model_len} tokens"
        if room_for_answer:
            reason += ", of which the answer needs at least one"
        return PromptTooLong(name, length, f"{reason}; please reduce the length of the prompt")

    def _check_token_ids(self, name: str, token_ids: Collection[int]) -> None:
        """An id past the end would fail in the middle of a step."""
        for outermost in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= outermost < self._vocab_size:
                reason = f"is out of vocabulary: token ids must be within [0, {self._vocab_size})"
                raise ConfigError(name, outermost, reason)

    def _resolve(self, params: SamplingParams, structured_outputs_name: str) -> SamplingParams:
        """`params`, checked, with bad words as token ids."""
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_token_ids("logprob_token_ids", params.logprob_token_ids or ())
        self._check_token_ids("logit_bias", params.logit_bias)
        if params.structured_outputs is not None:
            try:
                grammar.check(params.structured_outputs)
            except ConfigError as error:
                field = error.field if structured_outputs_name == "structured_outputs" else structured_outputs_name
                raise ConfigError(field, error.value, error.reason) from error
        if not params.bad_words:
            return params
        encode = partial(self._tokenizer.encode, add_special_tokens=False)
        token_ids = bad_words_token_ids(params.bad_words, encode)
        return msgspec.structs.replace(params, bad_words_token_ids=token_ids)

    def _requests(
        self, token_ids: list[int], params: SamplingParams, request_id: str, first_choice: int, priority: int
    ) -> list[EngineRequest]:
        """One per choice, numbered from `first_choice` on."""
        # More than fits is no error: the answer ends with "length" where the model ends.
        max_tokens = min(params.max_tokens, self._max_model_len - len(token_ids))
        requests = []
        for i in range(params.n):
            seed = params.seed_of_choice(i)
            # Each answer reports its seed, and JavaScript reads JSON's numbers exactly up to 53 bits.
            seed = self._seeds.getrandbits(53) if seed is None else seed
            choice_params = msgspec.structs.replace(params, max_tokens=max_tokens, seed=seed)
            id = f"{request_id}-{first_choice + i}"
            requests.append(EngineRequest(id, token_ids, choice_params, priority=priority))
        return requests

    def _tool_use(self, chat: ChatInput) -> ToolUse:
        template = self._tokenizer.template_for(has_tools=bool(chat.tools), own=chat.chat_template)
        return tool_use(
            chat.tools,
            chat.tool_choice,
            parallel=chat.parallel_tool_calls,
            template="" if template is None else template.source,
            format=self._tool_format,
        )

    def _reasoning_of(self, chat: ChatInput, prompt: str) -> Callable[[], ReasoningParser] | None:
        if self._reasoning is None:
            return None
        is_open = self._reasoning.is_open_after(prompt, chat.template_variables)
        return None if is_open is None else partial(self._reasoning, is_open=is_open, is_shown=chat.include_reasoning)

    def _end_of(self, reasoning: ReasoningParser) -> tuple[int | None, str] | None:
        """Where the form of an answer begins; None where it begins at once."""
        if reasoning.has_reasoning:
            return None, reasoning.end
        opening = self._tokenizer.encode(reasoning.start, add_special_tokens=False)
        # A mark of several tokens could not be told from the form's first tokens.
        return (opening[0], reasoning.end) if len(opening) == 1 else None


def _check_priority(priority: int) -> None:
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise ConfigError("priority", priority, f"must be within [-{MAX_PRIORITY}, {MAX_PRIORITY}]")


def bad_words_token_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """Each word as tokenized at the start of a text and, where its first token differs, after a space.

    encode: adds no special tokens. vLLM's rule (`SamplingParams.update_from_tokenizer`).
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        plain = tuple(encode(word.lstrip()))
        spaced = tuple(encode(" " + word.lstrip()))
        if plain:
            sequences.append(plain)
        if plain and spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            sequences.append(spaced)
    return tuple(sequences)


def _normalized(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for templates: content as text, arguments of tool calls as objects."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(_text_of_part(f"messages[{i}].content[{j}]", part) for j, part in enumerate(content))
    elif not isinstance(content, str | None):
        raise ConfigError(f"messages[{i}].content", content, "must be a text or a list of text parts")
    normalized = {**message, "content": content or ""}
    if isinstance(message.get("reasoning"), str):  # templates know the older name
        normalized.setdefault("reasoning_content", message["reasoning"])
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
            raise ConfigError(f"messages[{i}].tool_calls", calls, "must be a list of tool calls")
        normalized["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return normalized


def _cut_behind(text: str, content: str) -> str:
    """`text` up to the end of its last `content`: without what the template writes behind a message."""
    start = text.rfind(content.strip())
    if start < 0 or not content.strip():
        reason = "the chat template does not write the last message's content as it is"
        raise ConfigError("continue_final_message", True, reason)
    end = start + len(content.strip())
    trailing = content[len(content.rstrip()) :]
    return text[:end] + trailing if text.startswith(trailing, end) else text[:end]


def _text_of_part(name: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ConfigError(name, part, "must be a text part: {'type': 'text', 'text': …}")
    text: str = part["text"]
    return text


def _with_parsed_arguments(call: Any) -> Any:
    """Templates write arguments with `tojson`, so they get objects instead of OpenAI's JSON text."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call  # whatever it is, the template judges it
    return {**call, "function": {**call["function"], "arguments": arguments}}

"""Between the frontends and the lanes: accepts requests and streams their text, which stages/text makes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import NO_LIMIT
from stagemesh.deployments.ingress import request_id
from stagemesh.deployments.ingress.admission import Admission, Overloaded, Place
from stagemesh.deployments.ingress.deadline import Deadline
from stagemesh.deployments.ingress.errors import UnknownModel
from stagemesh.deployments.ingress.lanes import LaneClient
from stagemesh.deployments.ingress.merged import merged
from stagemesh.deployments.ingress.metrics import Metrics
from stagemesh.deployments.openai.embeddings import MAX_INPUTS, EmbeddingRequest, EmbeddingResponse
from stagemesh.deployments.openai.requests import (
    MAX_ANSWERS,
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    InferenceRequest,
)
from stagemesh.deployments.openai.responses import (
    CompletionTokensDetails,
    ModelCard,
    ModelPermission,
    PromptTokensDetails,
    Usage,
)
from stagemesh.deployments.openai.schema import OpenAIRequest
from stagemesh.stages.messages.request import EngineRequest, LaneError
from stagemesh.stages.text.input import ChatInput, InputProcessor, ProcessedPrompt
from stagemesh.stages.text.output import OutputProcessor, TextDelta, embedding_of, output_processors
from stagemesh.stages.text.tokenizer import Tokenizer

MAX_BODY_BYTES = 32 << 20
"""Parsing so many token ids takes a second of a router's time and 300 MB, whatever the model's context."""
LONG_TEXT_CHARS = 16_384
"""Longer texts are tokenized on another thread: a megabyte takes about a second."""

Result = TypeVar("Result")


class GenerationStream:
    """An accepted request, not started yet. Iterate `deltas()` once, or await `collect()`."""

    def __init__(
        self,
        id: str,
        model: str,
        prompts: Sequence[ProcessedPrompt],
        service: InferenceService,
        deadline: Deadline,
    ) -> None:
        """Raises Overloaded."""
        self.id = id
        self.model = model
        self.system_fingerprint = service.system_fingerprint
        self.created = int(time.time())
        self.choices = output_processors(prompts, service.tokenizer)
        self.tokenizer = service.tokenizer
        self._prompts = prompts
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._choices_per_prompt = len(prompts[0].requests)
        self._places = service.enter([choice.request for choice in self.choices])
        self._service = service
        self._deadline = deadline

    def prompt_of(self, choice: OutputProcessor) -> ProcessedPrompt:
        return self._prompts[choice.index // self._choices_per_prompt]

    def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Choices interleaved. Use under `aclosing`: closing aborts what still runs."""
        streams = [self._generate(choice, place) for choice, place in zip(self.choices, self._places, strict=True)]
        return streams[0] if len(streams) == 1 else merged(streams)

    async def collect(self) -> list[str]:
        """The text of every choice. Cancelling this aborts what still runs."""
        async with aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass
        return [choice.text for choice in self.choices]

    @property
    def usage(self) -> Usage:
        """So far; final when the deltas are exhausted."""
        completion_tokens = sum(len(choice.token_ids) for choice in self.choices)
        # The other choices of a prompt find it in the cache because the first has just put it there.
        cached_tokens = sum(choice.num_cached_tokens for choice in self.choices[:: self._choices_per_prompt])
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._num_prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens),
            completion_tokens_details=CompletionTokensDetails(sum(c.num_reasoning_tokens for c in self.choices)),
        )

    async def _generate(self, choice: OutputProcessor, place: Place) -> AsyncGenerator[TextDelta, None]:
        """Closing this, an error, or the deadline aborts the choice in its lane."""
        metrics = self._service.metrics
        started = time.perf_counter()
        last = 0.0
        outcome = "abort"
        timer = self._deadline.timer()
        try:
            async with aclosing(self._service.lanes.generate(choice.request)) as deltas:
                while (delta := await timer.next(deltas)) is not None:
                    now = time.perf_counter()
                    if last:
                        metrics.inter_token_latency.observe(now - last)
                    else:
                        place.begin()
                        metrics.time_to_first_token.observe(now - started)
                    last = now
                    text_delta = choice.process(delta)
                    if text_delta.finish_reason is not None:
                        break
                    yield text_delta
                else:
                    raise LaneError("lost", "the lane ended the answer before it was complete")
            # The lane is released before a slow client takes the last delta.
            metrics.e2e_latency.observe(last - started)
            outcome = {"tool_calls": "stop"}.get(text_delta.finish_reason, text_delta.finish_reason)
            yield text_delta
        except Exception:
            outcome = "error"
            raise
        finally:
            timer.close()
            place.leave()
            metrics.finished[outcome].inc()


class InferenceService:
    """One per router process, used from its event loop."""

    def __init__(
        self,
        *,
        lanes: LaneClient,
        tokenizer: Tokenizer,
        model_names: Sequence[str],
        max_model_len: int,
        vocab_size: int,
        sampling_defaults: Mapping[str, Any] | None = None,
        seed: int | None = None,
        max_num_seqs: int = 256,
        max_queued_tokens: int = 32_768,
        max_request_timeout_s: float = 3600.0,
        system_fingerprint: str = "",
        model_root: str | None = None,
        embedding_size: int | None = None,
        max_logprobs: int = MAX_LOGPROBS,
        trust_request_chat_template: bool = False,
        strict_fields: bool = False,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        """model_names: a response has the requested one, else the first. model_root: the model, as its server names it.

        sampling_defaults: for fields that a request leaves out. max_num_seqs, max_queued_tokens: see Admission. The
        others: see InputProcessor and EngineArgs.
        """
        self.metrics = Metrics(model_names[0], lanes)
        self.max_model_len = max_model_len
        self.lanes = lanes
        self.tokenizer = tokenizer
        self.system_fingerprint = system_fingerprint
        self._admission = Admission(lanes, max_requests=max_num_seqs, max_tokens=max_queued_tokens)
        self._max_timeout_s = max_request_timeout_s
        make_input = partial(
            InputProcessor,
            tokenizer,
            vocab_size=vocab_size,
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
        )
        self._input = make_input(max_model_len=max_model_len, seed=seed)
        self._counting = make_input(max_model_len=NO_LIMIT)  # takes no seed from the others
        self.vocab_size = vocab_size
        self.strict_fields = strict_fields
        self._trusts_templates = trust_request_chat_template
        self._max_logprobs = -1 if max_logprobs >= vocab_size else max_logprobs
        self._embedding_size = embedding_size
        self._models = {name: _model_card(name, model_root or model_names[0], max_model_len) for name in model_names}
        self._sampling_defaults = dict(sampling_defaults or {})

    @property
    def max_body_bytes(self) -> int:
        """1 MiB for the other fields, and 16 bytes per token (escaped text or ids) of as many prompts as may come."""
        num_prompts = max(MAX_ANSWERS, MAX_INPUTS)
        return min(MAX_BODY_BYTES, (1 << 20) + 16 * self.max_model_len * num_prompts)

    def ready(self) -> bool:
        return self.lanes.ready()

    def models(self) -> list[ModelCard]:
        return list(self._models.values())

    def model(self, name: str | None) -> ModelCard:
        """The first one for None. Raises UnknownModel."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModel("model", name, f"is not served here; served: {', '.join(self._models)}")
        return self._models[name]

    def check_room(self) -> None:
        """Raises Overloaded if a request need not even be read."""
        with self._counting_refusals():
            self._admission.check()

    def enter(self, requests: Sequence[EngineRequest]) -> list[Place]:
        """Queue all, or raise Overloaded."""
        with self._counting_refusals():
            return self._admission.enter(requests)

    async def complete(self, request: CompletionRequest) -> GenerationStream:
        """Raises ConfigError naming the wrong field, Overloaded."""
        deadline = self._deadline(request)
        model = self.model(request.model)
        id, lane_id = _ids("cmpl-", request)
        params = request.sampling_params(self._sampling_defaults, self._max_logprobs)
        process = partial(
            self._input.process_prompts,
            request.prompts(),
            params,
            lane_id,
            add_special_tokens=request.add_special_tokens is not False,
            structured_outputs_name=request.structured_outputs_name,
            priority=request.priority or 0,
            truncation=request.truncation,
        )
        prompts = await _run(process, is_slow=request.num_chars > LONG_TEXT_CHARS or bool(params.structured_outputs))
        _salt(prompts, request)
        return GenerationStream(id, model.id, prompts, self, deadline)

    async def chat(self, request: ChatRequest, conversation: int | None = None) -> GenerationStream:
        """conversation: which of an HTTP request's. Raises ConfigError naming the wrong field, Overloaded."""
        deadline = self._deadline(request)
        model = self.model(request.model)
        id, lane_id = _ids("chatcmpl-", request)
        if conversation is not None:
            lane_id += f"-{conversation}"
        params = request.sampling_params(self._sampling_defaults, self._max_logprobs)
        chat = self._trusted(request.chat_input())
        process = partial(
            self._input.process_chat,
            chat,
            params,
            lane_id,
            structured_outputs_name=request.structured_outputs_name,
            priority=request.priority or 0,
            truncation=request.truncation,
        )
        is_slow = request.num_chars > LONG_TEXT_CHARS or bool(params.structured_outputs or chat.tools)
        prompts = [await _run(process, is_slow=is_slow or chat.chat_template is not None)]
        _salt(prompts, request)
        return GenerationStream(id, model.id, prompts, self, deadline)

    async def chat_prompt(self, request: ChatRequest) -> ProcessedPrompt:
        """The prompt of a conversation, of any length. Raises ConfigError naming the wrong field."""
        self.model(request.model)
        chat = self._trusted(request.chat_input())
        params = request.sampling_params(self._sampling_defaults, self._max_logprobs)
        process = partial(self._counting.process_chat, chat, params, "count")
        return await _run(process, is_slow=request.num_chars > LONG_TEXT_CHARS or bool(chat.tools))

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encode = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await _run(encode, is_slow=len(text) > LONG_TEXT_CHARS)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """One vector per input. Raises ConfigError naming the wrong input, Overloaded. Cancelling aborts what runs."""
        deadline = self._deadline(request)
        model = self.model(request.model)
        size = self._embedding_size
        if request.dimensions is not None and size is not None and request.dimensions > size:
            raise ConfigError("dimensions", request.dimensions, f"must be within [1, {size}], what a vector has")
        id, lane_id = _ids("embd-", request)
        process = partial(self._embedding_requests, request, lane_id)
        requests = await _run(process, is_slow=request.num_chars > LONG_TEXT_CHARS or request.chat_template is not None)
        places = self.enter(requests)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._vector(one, place, deadline))
                    for one, place in zip(requests, places, strict=True)
                ]
        except ExceptionGroup as errors:  # the first is the cause
            raise errors.exceptions[0] from None
        num_tokens = sum(len(one.prompt_token_ids) for one in requests)
        vectors = [task.result() for task in tasks]
        is_big_endian = request.endianness == "big"
        return EmbeddingResponse.of(
            vectors, model.id, num_tokens, request.encoding_format, is_big_endian=is_big_endian, id=id
        )

    def _embedding_requests(self, request: EmbeddingRequest, id: str) -> list[EngineRequest]:
        inputs: Sequence[str | list[int]]
        if request.messages:
            name, inputs = "messages", [self._input.render(self._trusted(request.conversation()))]
            add_special_tokens = request.add_special_tokens is True
        else:
            name, inputs = "input", request.inputs()
            add_special_tokens = request.add_special_tokens is not False
        return self._input.process_embeddings(
            inputs,
            request.params(),
            id,
            name=name,
            add_special_tokens=add_special_tokens,
            priority=request.priority or 0,
            truncation=request.truncation,
        )

    def _trusted(self, chat: ChatInput) -> ChatInput:
        """`chat`. Raises ConfigError for a template of its own, unless clients are trusted with that."""
        if chat.chat_template is not None and not self._trusts_templates:
            reason = "is not taken from requests; the server can be started with --trust-request-chat-template"
            raise ConfigError("chat_template", chat.chat_template, reason)
        return chat

    async def _vector(self, request: EngineRequest, place: Place, deadline: Deadline) -> bytes:
        timer = deadline.timer()
        try:
            async with aclosing(self.lanes.generate(request)) as deltas:
                if (delta := await timer.next(deltas)) is not None:
                    return embedding_of(delta)
        finally:
            timer.close()
            place.leave()
        raise LaneError("lost", "the lane ended the request before it was complete")

    def _deadline(self, request: OpenAIRequest) -> Deadline:
        timeout = request.timeout
        return Deadline(self._max_timeout_s if timeout is None else min(timeout, self._max_timeout_s))

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except Overloaded:
            self.metrics.refused.inc()
            raise


def _ids(prefix: str, request: OpenAIRequest) -> tuple[str, str]:
    """Of the answer, and of its parts in the lanes, where the id of a client that repeats one must not repeat."""
    current = request_id.current.get() or request_id.RequestId()
    current.take(request.request_id)
    id = prefix + current.value
    return id, f"{id}-{uuid.uuid4().hex[:16]}" if current.is_given else id


def _salt(prompts: Sequence[ProcessedPrompt], request: InferenceRequest) -> None:
    for prompt in prompts:
        for engine_request in prompt.requests:
            engine_request.cache_salt = request.cache_salt or ""


def _model_card(name: str, root: str, max_model_len: int) -> ModelCard:
    now = int(time.time())
    return ModelCard(name, now, max_model_len, root, [ModelPermission(f"modelperm-{uuid.uuid4().hex}", now)])


async def _run(function: Callable[[], Result], *, is_slow: bool) -> Result:
    """On another thread if it is slow, else every running stream would stall."""
    return await asyncio.to_thread(function) if is_slow else function()

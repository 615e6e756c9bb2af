"""Between the doors (HTTP, gRPC) and the lanes: a request is checked, tokenized, and becomes one or more choices.

Everything that decides what an answer is lives here and in `choice.py`, once. A door only parses its own format and
writes its own.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams, StructuredOutputsParams
from stagemesh.deployments.ingress.choice import Choice, Piece
from stagemesh.deployments.ingress.errors import UnknownModel
from stagemesh.deployments.ingress.lanes import LaneClient, LaneError
from stagemesh.deployments.ingress.limits import check_params, check_prompt
from stagemesh.deployments.ingress.metrics import Metrics
from stagemesh.deployments.openai.embeddings import EmbeddingRequest, EmbeddingResponse, vector_of
from stagemesh.deployments.openai.logprobs import LogprobDecoder
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest, InferenceRequest, NamedTool
from stagemesh.deployments.openai.responses import ModelCard, PromptTokensDetails, Usage
from stagemesh.stages.engine import grammar as structured
from stagemesh.stages.engine.logits_processor import bad_words_token_ids
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_calls import (
    NO_PARAMETERS,
    NamedParser,
    ObjectsParser,
    ToolParser,
    forced_calls_schema,
    format_of,
    free_parser,
)

MAX_CHOICES = 256
"""Prompts times n of one request; each is a sequence of its own in a lane."""
MAX_STOPS = 16
MAX_STOP_CHARS = 256
DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions when not given, as OpenAI has it, and vLLM, whatever the model's own default is."""
MAX_LOGPROBS = 20
"""Likeliest tokens reported per token, as vLLM's `max_logprobs` and OpenAI have it."""
MAX_BAD_WORDS = 128
_LONG_TEXT_CHARS = 16_384
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


class Generation:
    """An accepted request: valid, tokenized, not started. Iterate `pieces()` once, or await `collect()`."""

    def __init__(
        self,
        id: str,
        model: str,
        num_prompt_tokens: int,
        choices: list[Choice],
        choices_per_prompt: int,
        lanes: LaneClient,
        metrics: Metrics,
    ) -> None:
        self.id = id
        self.model = model
        self.created = int(time.time())
        self.choices = choices
        self._num_prompt_tokens = num_prompt_tokens
        self._choices_per_prompt = choices_per_prompt
        self._lanes = lanes
        self._metrics = metrics

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """New text as it comes, choices interleaved. Use under `aclosing`: closing aborts what still runs."""
        streams = [choice.pieces(self._lanes, self._metrics) for choice in self.choices]
        return streams[0] if len(streams) == 1 else _merge(streams)

    async def collect(self) -> list[str]:
        """The whole text of every choice. Cancelling this aborts what still runs."""
        texts: list[list[str]] = [[] for _ in self.choices]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index].append(piece.text)
        return ["".join(parts) for parts in texts]

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the pieces are exhausted."""
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        # The other choices of a prompt find it in the cache because the first has just put it there.
        cached_tokens = sum(choice.num_cached_tokens for choice in self.choices[:: self._choices_per_prompt])
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._num_prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens),
        )


class InferenceService:
    """Takes requests of either door. One per router process, used from its event loop."""

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
    ) -> None:
        """
        model_names: what requests may call the model; answers carry the one they asked for, else the first.
        max_model_len: most tokens of a prompt and its answer together.
        vocab_size: of the model, the bound of token ids that a client may send.
        sampling_defaults: e.g. {"temperature": 0.6}, used where a request says nothing; see generation_config.py.
        seed: fixes the seeds that requests without one get, in the order of the requests; None draws it.
        """
        self.metrics = Metrics(model_names[0], lanes.lane_stats)
        self.max_model_len = max_model_len
        self._lanes = lanes
        self._tokenizer = tokenizer
        self._models = {name: ModelCard(name, int(time.time()), max_model_len) for name in model_names}
        self._vocab_size = vocab_size
        self._seeds = random.Random(seed)
        self._sampling_defaults = dict(sampling_defaults or {})
        self._default_max_tokens = self._sampling_defaults.pop("max_tokens", max_model_len)

    @property
    def max_body_bytes(self) -> int:
        """Room for any prompt that fits: 16 bytes per token, escaped text or token ids; at least 1 MiB."""
        return max(1 << 20, 16 * self.max_model_len)

    def ready(self) -> bool:
        """Whether some lane can generate now."""
        return self._lanes.ready()

    def models(self) -> list[ModelCard]:
        return list(self._models.values())

    def model(self, name: str | None) -> ModelCard:
        """The model of that name, the first one for None. Raises UnknownModel."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModel("model", name, f"is not served here; served: {', '.join(self._models)}")
        return self._models[name]

    async def complete(self, request: CompletionRequest) -> Generation:
        """Accept a completion request. Raises ConfigError naming the field that is wrong."""
        model = self.model(request.model)
        given = request.prompts()
        self._check_num_choices(len(given), request.n)
        prompts = await self._tokenized("prompt", given, request.add_special_tokens)
        max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        form = request.form()
        await _check_form(form, request)
        return self._generation("cmpl-", model, request, prompts, max_tokens, form)

    async def chat(self, request: ChatRequest) -> Generation:
        """Accept a chat request. Raises ConfigError naming the field that is wrong."""
        model = self.model(request.model)
        self._check_num_choices(1, request.n)
        if not request.messages:
            raise ConfigError("messages", [], "must hold at least one message")
        form, make_parser = self._tool_use(request)
        await _check_form(form, request)
        variables = dict(request.chat_template_kwargs or {})
        if (tools := request.tools_for_template()) is not None:
            variables["tools"] = tools
        text = self._tokenizer.render_chat(
            [message.for_template() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt is not False,
            **variables,
        )
        (prompt,) = await self._tokenized("messages", [text], add_special_tokens=False)
        max_tokens = self._default_max_tokens if request.max_tokens is None else request.max_tokens
        if request.max_completion_tokens is not None:
            max_tokens = request.max_completion_tokens
            if max_tokens < 1:
                raise ConfigError("max_completion_tokens", max_tokens, "must be at least 1")
        return self._generation("chatcmpl-", model, request, [prompt], max_tokens, form, make_parser)

    def _tool_use(self, request: ChatRequest) -> tuple[StructuredOutputsParams | None, Callable[[], ToolParser] | None]:
        """The form of the answer, and who finds the calls in it. Raises ConfigError."""
        form = request.form()
        functions = request.functions()
        if not functions:
            return form, None
        parallel = request.parallel_tool_calls is not False
        if request.tool_choice in (None, "auto"):
            template = self._tokenizer.chat_template
            format = None if template is None else format_of(template.source)
            if format is None:
                names = [function["name"] for function in functions]
                raise ConfigError("tools", names, "this model's chat template has no format for calling them freely")
            return form, partial(free_parser, format, parallel=parallel)
        if form is not None:
            raise ConfigError("tool_choice", "required", "leaves no room for another form of the answer")
        if isinstance(request.tool_choice, NamedTool):
            name = request.tool_choice.function.name
            (function,) = (function for function in functions if function["name"] == name)
            schema = function.get("parameters") or NO_PARAMETERS
            return StructuredOutputsParams(json=schema), partial(NamedParser, name)
        schema = forced_calls_schema(functions, parallel=parallel)
        return StructuredOutputsParams(json=schema), partial(ObjectsParser, before="[", between=",")

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """One vector per input. Raises ConfigError naming the input that is wrong. Cancelling aborts what runs."""
        model = self.model(request.model)
        asked = SamplingParams(max_tokens=1, temperature=0.0, seed=0, pooling=request.params())
        prompts = await self._tokenized("input", request.inputs(), request.add_special_tokens, room_for_answer=0)
        id = "embd-" + uuid.uuid4().hex
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._vector(prompt, asked, f"{id}-{i}")) for i, prompt in enumerate(prompts)
                ]
        except ExceptionGroup as errors:  # the first is the one worth telling
            raise errors.exceptions[0] from None
        vectors = [task.result() for task in tasks]
        return EmbeddingResponse.of(vectors, model.id, sum(map(len, prompts)), request.encoding_format)

    async def _vector(self, prompt: list[int], asked: SamplingParams, request_id: str) -> bytes:
        async with aclosing(self._lanes.generate(prompt, asked, request_id)) as deltas:
            async for delta in deltas:
                return vector_of(delta)
        raise LaneError("lost", "the lane ended the request before it was complete")

    async def _tokenized(
        self,
        field: str,
        prompts: Sequence[str | list[int]],
        add_special_tokens: bool | None,
        *,
        room_for_answer: int = 1,
    ) -> list[list[int]]:
        """Token ids of all prompts, checked. Raises ConfigError that names the prompt."""
        names = [field] if len(prompts) == 1 else [f"{field}[{i}]" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            if not prompt:
                raise ConfigError(name, prompt, "must not be empty")

        def tokenize() -> list[list[int]]:
            special = add_special_tokens is not False
            return [
                self._tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        # A megabyte takes about a second; on this thread every running stream would stand still for it.
        is_long = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > _LONG_TEXT_CHARS
        tokenized = await asyncio.to_thread(tokenize) if is_long else tokenize()
        for name, token_ids in zip(names, tokenized, strict=True):
            check_prompt(
                name,
                token_ids,
                vocab_size=self._vocab_size,
                max_model_len=self.max_model_len,
                room_for_answer=room_for_answer,
            )
        return tokenized

    def _check_num_choices(self, num_prompts: int, n: int | None) -> None:
        n = 1 if n is None else n
        if not 1 <= n <= MAX_CHOICES:
            raise ConfigError("n", n, f"must be within [1, {MAX_CHOICES}]")
        if num_prompts * n > MAX_CHOICES:
            raise ConfigError("prompt", num_prompts, f"prompts times n={n} must not exceed {MAX_CHOICES}")

    def _generation(
        self,
        prefix: str,
        model: ModelCard,
        request: InferenceRequest,
        prompts: list[list[int]],
        max_tokens: int,
        form: StructuredOutputsParams | None,
        make_parser: Callable[[], ToolParser] | None = None,
    ) -> Generation:
        id = prefix + uuid.uuid4().hex
        n = request.n or 1
        choices: list[Choice] = []
        for prompt in prompts:
            # More than fits is no error: the answer ends with "length" where the model ends.
            params = self._sampling_params(request, min(max_tokens, self.max_model_len - len(prompt)), form)
            has_reports = params.logprobs is not None or params.prompt_logprobs is not None
            for i in range(n):
                index = len(choices)
                seed = params.seed_of_choice(i)
                choices.append(
                    Choice(
                        index,
                        f"{id}-{index}",
                        prompt,
                        msgspec.structs.replace(params, seed=self._seeds.getrandbits(63) if seed is None else seed),
                        self._tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens),
                        LogprobDecoder(self._tokenizer) if has_reports else None,
                        None if make_parser is None else make_parser(),
                    )
                )
        return Generation(id, model.id, sum(map(len, prompts)), choices, n, self._lanes, self.metrics)

    def _sampling_params(
        self, request: InferenceRequest, max_tokens: int, form: StructuredOutputsParams | None
    ) -> SamplingParams:
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stop) > MAX_STOPS:
            raise ConfigError("stop", len(stop), f"must not hold more than {MAX_STOPS} strings")
        for text in stop:
            if len(text) > MAX_STOP_CHARS:
                raise ConfigError("stop", text, f"must not be longer than {MAX_STOP_CHARS} characters")
        bad_words = request.bad_words or []
        if len(bad_words) > MAX_BAD_WORDS:
            raise ConfigError("bad_words", len(bad_words), f"must not hold more than {MAX_BAD_WORDS} words")
        for name, number in (("logprobs", request.num_logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise ConfigError(name, number, f"must be within [0, {MAX_LOGPROBS}]")
        params = SamplingParams(
            **(self._sampling_defaults | given),
            max_tokens=max_tokens,
            seed=request.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            logit_bias=_logit_bias(request.logit_bias or {}),
            # OpenAI's clients write an empty list where they mean nothing.
            allowed_token_ids=tuple(request.allowed_token_ids) if request.allowed_token_ids else None,
            bad_words=tuple(bad_words),
            bad_words_token_ids=bad_words_token_ids(
                bad_words, partial(self._tokenizer.encode, add_special_tokens=False)
            ),
            logprobs=request.num_logprobs,
            structured_outputs=form,
        )
        check_params(params, self._vocab_size)
        return params


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    for key in given:
        if not key.isdecimal():
            raise ConfigError("logit_bias", key, "its keys must be token ids")
    return {int(key): value for key, value in given.items()}


async def _check_form(form: StructuredOutputsParams | None, request: InferenceRequest) -> None:
    """Raises ConfigError naming the field that the form comes from."""
    if form is None:
        return
    try:
        # On another thread: a large schema takes up to a second.
        await asyncio.to_thread(structured.check, form)
    except ConfigError as error:
        if request.structured_outputs is not None:
            raise
        is_format = request.response_format is not None and request.response_format.json_schema is not None
        field = "response_format.json_schema" if is_format else "tools"
        raise ConfigError(field, form.json, error.reason) from error


async def _merge(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of all streams as they come. The first error ends all; closing this closes them."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def drain(stream: AsyncIterator[Piece]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""`LLM`: a model in a script, without a server, with vLLM's arguments and results.

One rank runs in the script's own process (local_lane.py), several as Ray actors (ray_lane.py).
"""

from __future__ import annotations

import logging
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from stagemesh.config.capacity import capacity_line
from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.generation_config import default_sampling
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams
from stagemesh.config.vllm_flags import inert_warning, split_inert
from stagemesh.deployments.offline.inbox import Inbox, LaneFailed, deltas_of
from stagemesh.deployments.offline.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    RequestState,
)
from stagemesh.stages.engine.engine import Engine
from stagemesh.stages.engine.lane import Lane
from stagemesh.stages.messages.request import EngineRequest, TokenDelta
from stagemesh.stages.text.input import ChatInput, InputProcessor
from stagemesh.stages.text.output import embedding_of
from stagemesh.stages.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
Vector = npt.NDArray[np.float32]
ProgressBar = Callable[..., Any]


class OfflineLane(Lane, Protocol):
    engine: Engine


class LLM:
    """Loaded once for any number of calls. `close()`, a `with` block or garbage collection ends its processes."""

    def __init__(
        self, model: str, *, tokenizer: str | None = None, dtype: Any = "auto", seed: int | None = 0, **engine_args: Any
    ) -> None:
        """Load `model`, a folder or a hub id. Raises ConfigError naming what cannot work.

        tokenizer: another folder or hub id for the tokenizer. seed: for requests without a seed of their own;
        None draws one. engine_args: fields of `config.engine.EngineArgs`.
        """
        if tokenizer is not None:
            engine_args["tokenizer"] = tokenizer
        self.config = EngineConfig.resolve(_engine_args(model, dtype, seed, engine_args))
        self._tokenizer = Tokenizer.from_folder(self.config.local_tokenizer_path(), self.config.chat_template)
        self._input = InputProcessor(
            self._tokenizer,
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.config.max_model_len,
            seed=seed,
            tool_call_parser=self.config.tool_call_parser,
            reasoning_parser=self.config.reasoning_parser,
        )
        self._inbox = Inbox()
        self._lane = _start_lane(self.config, self._inbox)
        self._finalizer = weakref.finalize(self, _close_from_anywhere, self._lane)
        num_tokens = self._lane.num_blocks * self.config.block_size
        logger.info("%s", capacity_line(self.config.device, num_tokens, self.config.max_model_len))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the lane; safe to call twice. Later calls raise LaneFailed."""
        self._inbox.fail(LaneFailed("this LLM was closed"))
        if self._finalizer.detach():
            self._lane.close()

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults, if any."""
        return SamplingParams(**default_sampling(self.config))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in their order.

        sampling_params: one for all, or one per prompt. priority: one per prompt, lower ones go first. Raises
        ConfigError naming the prompt that cannot run, before any does, and LaneFailed when the lane breaks.
        """
        texts_and_prompts = [_text_and_prompt(i, prompt) for i, prompt in enumerate(_as_list(prompts))]
        if priority is not None and len(priority) != len(texts_and_prompts):
            reason = f"must be as many as there are prompts ({len(texts_and_prompts)})"
            raise ConfigError("priority", len(priority), reason)
        call = _new_id()
        states = []
        for i, params in enumerate(self._params_of_each(sampling_params, len(texts_and_prompts))):
            text, prompt = texts_and_prompts[i]
            (processed,) = self._input.process_prompts(
                [prompt], params, f"{call}-{i}", name=f"prompts[{i}]", priority=priority[i] if priority else 0
            )
            states.append(RequestState(f"{call}-{i}", text, processed, self._tokenizer))
        return self._run(call, states, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue one conversation, or each of several, by the model's chat template.

        tools: functions, in OpenAI's shape. tool_choice: None leaves the model's tool calls in the text; "auto",
        "required" or a named function parse them, as over HTTP.
        """
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        call = _new_id()
        states = []
        for i, params in enumerate(self._params_of_each(sampling_params, len(conversations))):
            chat = ChatInput(
                messages=conversations[i],
                tools=tools or (),
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                add_generation_prompt=add_generation_prompt,
                template_variables=chat_template_kwargs or {},
            )
            processed = self._input.process_chat(chat, params, f"{call}-{i}")
            states.append(RequestState(f"{call}-{i}", processed.text, processed, self._tokenizer))
        return self._run(call, states, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, by default of length 1."""
        return [
            EmbeddingRequestOutput(id, EmbeddingOutput(vector.tolist()), ids, num_cached_tokens=cached)
            for id, vector, ids, cached in self._pool(prompts, pooling_params, use_tqdm)
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The vectors of `embed` as torch tensors."""
        import torch

        return [
            PoolingRequestOutput(id, PoolingOutput(torch.from_numpy(vector)), ids, num_cached_tokens=cached)
            for id, vector, ids, cached in self._pool(prompts, pooling_params, use_tqdm)
        ]

    # -- one call ----------------------------------------------------------------------------------------

    def _run(self, call: str, states: list[RequestState], use_tqdm: bool | ProgressBar) -> list[RequestOutput]:
        running = {choice.request.request_id: (state, choice) for state in states for choice in state.choices}
        requests = [choice.request for state in states for choice in state.choices]
        with _progress(use_tqdm, len(states)) as bar, self._deltas(call, requests) as deltas:
            while running:
                delta = next(deltas)
                if delta.request_id not in running:
                    continue  # the answer has already reached its stop string
                state, choice = running[delta.request_id]
                choice.process(delta)
                state.tick()
                if choice.finish_reason is None:
                    continue
                if delta.finish_reason is None:
                    self._lane.abort(delta.request_id)  # a stop string, which the engine does not see
                del running[delta.request_id]
                if state.is_finished:
                    bar.update()
        return [state.output() for state in states]

    def _pool(
        self, prompts: Any, params: PoolingParams | None, use_tqdm: bool | ProgressBar
    ) -> list[tuple[str, Vector, list[int], int]]:
        """(request id, vector, token ids, cached tokens) of each prompt."""
        call = _new_id()
        requests = []
        for i, prompt in enumerate(_as_list(prompts)):
            _, to_embed = _text_and_prompt(i, prompt)
            pooling = params or PoolingParams()
            requests += self._input.process_embeddings([to_embed], pooling, f"{call}-{i}", name=f"prompts[{i}]")
        by_request: dict[str, TokenDelta] = {}
        with _progress(use_tqdm, len(requests)) as bar, self._deltas(call, requests) as deltas:
            while len(by_request) < len(requests):
                delta = next(deltas)
                by_request[delta.request_id] = delta
                bar.update()
        results = []
        for request in requests:
            delta = by_request[request.request_id]
            vector = np.frombuffer(embedding_of(delta), np.float32).copy()
            results.append((request.request_id, vector, request.prompt_token_ids, delta.num_cached_tokens))
        return results

    def _params_of_each(self, params: Any, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        each = list(params)
        if len(each) != count:
            raise ConfigError("sampling_params", len(each), f"must be one, or as many as there are prompts ({count})")
        return each

    @contextmanager
    def _deltas(self, call: str, requests: Sequence[EngineRequest]) -> Iterator[Iterator[TokenDelta]]:
        """Start requests, iterate over their tokens and raise their errors; on leaving, abort those that still run."""
        queue = self._inbox.open(call)
        try:
            for request in requests:
                done = self._lane.generate(msgspec.structs.replace(request, reply_to=call))
                done.add_done_callback(lambda done: queue.put(error) if (error := done.exception()) else None)  # type: ignore[arg-type]
            yield deltas_of(queue)
        finally:
            self._inbox.close(call)
            for request in requests:
                self._lane.abort(request.request_id)


def _engine_args(model: str, dtype: Any, seed: int | None, vllm_args: Mapping[str, Any]) -> EngineArgs:
    # In vLLM None means the default; a torch.dtype prints as its name.
    given = {name: value for name, value in vllm_args.items() if value is not None}
    args, without_effect = split_inert(given)
    if without_effect:
        logger.warning("%s", inert_warning(without_effect))
    return EngineArgs.parse({"model": model, "dtype": str(dtype).removeprefix("torch."), "seed": seed, **args})


def _start_lane(config: EngineConfig, inbox: Inbox) -> OfflineLane:
    def on_failure(reason: str) -> None:
        inbox.fail(LaneFailed(reason))

    if config.plan.tp_size * config.plan.pp_size == 1:
        from stagemesh.deployments.offline.local_lane import LocalLane

        lane: OfflineLane = LocalLane(config, inbox, on_failure)
    else:
        from stagemesh.deployments.offline.ray_lane import RayLane

        lane = RayLane(config, inbox, on_failure)
    lane.start()
    return lane


def _close_from_anywhere(lane: OfflineLane) -> None:
    """The garbage collector may run in a thread that closing waits for."""
    if threading.current_thread() is threading.main_thread():
        lane.close()
    else:
        threading.Thread(target=lane.close, name="close lane").start()


def _new_id() -> str:
    return uuid.uuid4().hex[:12]


def _as_list(prompts: Any) -> list[Any]:
    """A list of numbers is one prompt, as token ids."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _text_and_prompt(i: int, prompt: Prompt) -> tuple[str | None, str | list[int]]:
    """Its text, if known, and what the model gets: text to be tokenized, or token ids."""
    if isinstance(prompt, str):
        return prompt, prompt
    if not isinstance(prompt, Mapping):
        return None, list(prompt)
    text = prompt.get("prompt")
    if (token_ids := prompt.get("prompt_token_ids")) is not None:
        return text, list(token_ids)
    if text is None:
        raise ConfigError(f"prompts[{i}]", dict(prompt), "must hold 'prompt' or 'prompt_token_ids'")
    return text, text


def _progress(use_tqdm: bool | ProgressBar, total: int) -> closing[Any]:
    make = use_tqdm if callable(use_tqdm) else tqdm
    return closing(make(total=total, desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm))

"""`LLM`: a model in a script, without a server, with vLLM's arguments and results.

One rank runs in the script's own process (local_lane.py), several as Ray actors (ray_lane.py).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import msgspec
import numpy as np

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.generation_config import default_sampling
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams
from stagemesh.config.vllm_flags import inert_warning, split_inert
from stagemesh.deployments.offline.beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, search
from stagemesh.deployments.offline.inbox import Inbox, LaneFailed, deltas_of
from stagemesh.deployments.offline.metrics import Metric, metrics_of
from stagemesh.deployments.offline.outputs import RequestOutput, RequestState
from stagemesh.deployments.offline.parallel_lanes import OfflineLane, ParallelLanes
from stagemesh.deployments.offline.pooling import Pooled, PoolingCalls
from stagemesh.deployments.offline.progress import Answering, ProgressBar, loading, log_summary, show_log
from stagemesh.deployments.offline.prompts import PromptType, as_list, text_and_prompt
from stagemesh.deployments.offline.tokenizer import Message, NoText, OpenTokenizer, ScriptTokenizer, no_tokenizer
from stagemesh.stages.messages.request import EngineRequest, TokenDelta
from stagemesh.stages.text.input import ChatInput, InputProcessor, ProcessedPrompt
from stagemesh.stages.text.output import embedding_of

logger = logging.getLogger(__name__)


UNSUPPORTED = {"lora_request", "mm_processor_kwargs", "prompt_adapter_request", "tokenization_kwargs"}
"""vLLM's arguments of calls that must be None here."""
RESET_TIMEOUT_S = 1.0
"""For the last steps of a call that has just ended."""


class LLM(PoolingCalls):
    """Loaded once for any number of calls. `close()`, a `with` block or garbage collection ends its processes."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        dtype: Any = "auto",
        seed: int | None = 0,
        use_tqdm_on_load: bool = True,
        **engine_args: Any,
    ) -> None:
        """Load `model`, a folder or a hub id. Raises ConfigError naming what cannot work.

        tokenizer: another folder or hub id for the tokenizer. skip_tokenizer_init: token ids in, token ids out.
        seed: for requests without a seed of their own; None draws one. engine_args: fields of
        `config.engine.EngineArgs`; data_parallel_size is the number of lanes.
        """
        show_log()
        if tokenizer is not None:
            engine_args["tokenizer"] = tokenizer
        self.config = EngineConfig.resolve(_engine_args(model, dtype, seed, engine_args))
        if self.config.autoscaling_config is not None:
            raise ConfigError("autoscaling_config", self.config.autoscaling_config, "is for a server, not for `LLM`")
        self._tokenizer_path = self.config.local_tokenizer_path()
        self._tokenizer = (
            NoText()
            if skip_tokenizer_init
            else OpenTokenizer.from_folder(self._tokenizer_path, self.config.chat_template)
        )
        self._script_tokenizer: ScriptTokenizer | None = None
        self._input = InputProcessor(
            self._tokenizer,
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.config.max_model_len,
            seed=seed,
            tool_call_parser=self.config.tool_call_parser,
            reasoning_parser=self.config.reasoning_parser,
        )
        self._inbox = Inbox()
        with loading(use_tqdm_on_load, self.config.data_parallel_size) as on_phase:
            self._lane = _start_lane(self.config, self._inbox, on_phase)
        self._finalizer = weakref.finalize(self, _close_from_anywhere, self._lane)
        log_summary(self.config, self._lane.num_blocks)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        return cls(**engine_args.model_dump(exclude_unset=True))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the lane; safe to call twice. Later calls raise LaneFailed."""
        self._inbox.fail(LaneFailed("this LLM was closed"))
        if self._finalizer.detach():
            self._lane.close()

    def get_tokenizer(self) -> ScriptTokenizer:
        """The model's tokenizer under transformers' names."""
        if self._script_tokenizer is None:
            if not isinstance(self._tokenizer, OpenTokenizer):
                raise no_tokenizer()
            folder, longest = self._tokenizer_path, self.config.max_model_len
            self._script_tokenizer = ScriptTokenizer(self._tokenizer, folder, longest)
        return self._script_tokenizer

    def get_metrics(self) -> list[Metric]:
        """Of each lane, which the label "engine" numbers."""
        futures = [lane.engine.stats() for lane in _each(self._lane)]
        name = self.config.served_model_names[0]
        labels = [{"model_name": name, "engine": str(i)} for i in range(len(futures))]
        return [metric for i, stats in enumerate(futures) for metric in metrics_of(stats.result(), labels[i])]

    def reset_prefix_cache(self) -> bool:
        """Forget the KV of earlier prompts. False if requests are running: then some is kept."""
        deadline = time.monotonic() + RESET_TIMEOUT_S
        while not all(lane.engine.reset_prefix_cache().result() for lane in _each(self._lane)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults, if any."""
        return SamplingParams(**default_sampling(self.config))

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
        priority: Sequence[int] | None = None,
        **unsupported: None,
    ) -> list[RequestOutput]:
        """Answer every prompt, in their order.

        sampling_params: one for all, or one per prompt. priority: one per prompt, lower ones go first. Raises
        ConfigError naming the prompt that cannot run, before any does, and LaneFailed when the lane breaks.
        """
        _refuse(unsupported)
        texts_and_prompts = [text_and_prompt(i, prompt) for i, prompt in enumerate(as_list(prompts))]
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
            states.append(self._state(f"{call}-{i}", text, processed, params))
        return self._run(call, states, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | ProgressBar = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        **unsupported: None,
    ) -> list[RequestOutput]:
        """Continue one conversation, or each of several, by a chat template: the model's own if none is given.

        tools: functions, in OpenAI's shape. tool_choice: None leaves the model's tool calls in the text; "auto",
        "required" or a named function parse them, as over HTTP. chat_template_content_format: templates always get
        text. continue_final_message: the answer goes on behind the last message; not with add_generation_prompt.
        """
        _refuse({"lora_request": lora_request, **unsupported})
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
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                template_variables=chat_template_kwargs or {},
            )
            processed = self._input.process_chat(chat, params, f"{call}-{i}")
            states.append(self._state(f"{call}-{i}", processed.text, processed, params))
        return self._run(call, states, use_tqdm)

    def beam_search(
        self, prompts: PromptType | Sequence[PromptType], params: BeamSearchParams, **unsupported: None
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt that a search with `beam_width` finds, the best one first."""
        _refuse(unsupported)
        searches = []
        for i, prompt in enumerate(as_list(prompts)):
            _, text_or_ids = text_and_prompt(i, prompt)
            token_ids = self._tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
            searches.append(BeamSearch(prompt, token_ids, params, self.config.model.eos_token_ids))
        outputs = search(
            searches,
            params,
            max_model_len=self.config.max_model_len,
            vocab_size=self.config.model.vocab_size,
            generate=lambda prompts, step: self.generate(prompts, step, use_tqdm=False),
        )
        for sequence in (sequence for output in outputs for sequence in output.sequences):
            sequence.text = self._tokenizer.decode(sequence.tokens, skip_special_tokens=False)
        return outputs

    # -- one call ----------------------------------------------------------------------------------------

    def _run(self, call: str, states: list[RequestState], use_tqdm: bool | ProgressBar) -> list[RequestOutput]:
        running = {choice.request.request_id: (state, choice) for state in states for choice in state.choices}
        requests = [choice.request for state in states for choice in state.choices]
        with closing(Answering(use_tqdm, len(states))) as bar, self._deltas(call, requests) as deltas:
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
                    bar.finished(state.num_prompt_tokens, state.num_output_tokens)
        return [state.output() for state in states]

    def _state(self, id: str, text: str | None, processed: ProcessedPrompt, params: SamplingParams) -> RequestState:
        return RequestState(id, text, processed, self._tokenizer if params.detokenize else NoText())

    def _pool(self, prompts: Any, params: PoolingParams | None, use_tqdm: bool | ProgressBar) -> list[Pooled]:
        call = _new_id()
        requests = []
        for i, prompt in enumerate(as_list(prompts)):
            _, to_embed = text_and_prompt(i, prompt)
            pooling = params or PoolingParams()
            requests += self._input.process_embeddings([to_embed], pooling, f"{call}-{i}", name=f"prompts[{i}]")
        by_request: dict[str, TokenDelta] = {}
        num_tokens = {request.request_id: len(request.prompt_token_ids) for request in requests}
        with closing(Answering(use_tqdm, len(requests))) as bar, self._deltas(call, requests) as deltas:
            while len(by_request) < len(requests):
                delta = next(deltas)
                by_request[delta.request_id] = delta
                bar.finished(num_tokens[delta.request_id], 0)
        results = []
        for request in requests:
            delta = by_request[request.request_id]
            vector = np.frombuffer(embedding_of(delta), np.float32).copy()
            results.append(Pooled(request.request_id, vector, request.prompt_token_ids, delta.num_cached_tokens))
        return results

    def _params_of_each(self, params: Any, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        each = [params.clone()] * count if isinstance(params, SamplingParams) else [one.clone() for one in params]
        if len(each) != count:
            raise ConfigError("sampling_params", len(each), f"must be one, or as many as there are prompts ({count})")
        if isinstance(self._tokenizer, NoText) and any(one.stop for one in each):
            raise no_tokenizer()
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
    if args.get("layout") is not None:
        raise ConfigError("layout", args["layout"], "is for a server: say the sizes, which `stagemesh plan` tells")
    return EngineArgs.parse({"model": model, "dtype": str(dtype).removeprefix("torch."), "seed": seed, **args})


def _start_lane(config: EngineConfig, inbox: Inbox, on_phase: Callable[[str], None]) -> OfflineLane | ParallelLanes:
    def on_failure(reason: str) -> None:
        inbox.fail(LaneFailed(reason))

    if config.plan.tp_size * config.plan.pp_size * config.data_parallel_size == 1:
        from stagemesh.deployments.offline.local_lane import LocalLane

        lane: OfflineLane | ParallelLanes = LocalLane(config, inbox, on_failure, on_phase)
    else:
        from stagemesh.deployments.offline.ray_lane import RayLane

        lanes = [RayLane(config, inbox, on_failure, on_phase) for _ in range(config.data_parallel_size)]
        lane = ParallelLanes(lanes) if len(lanes) > 1 else lanes[0]
    lane.start()
    return lane


def _each(lane: OfflineLane | ParallelLanes) -> Sequence[OfflineLane]:
    return lane.lanes if isinstance(lane, ParallelLanes) else [lane]


def _refuse(unsupported: Mapping[str, Any]) -> None:
    for name, value in unsupported.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"unexpected argument {name!r}")
        if value is not None:
            raise ConfigError(name, value, "is not supported")


def _close_from_anywhere(lane: OfflineLane | ParallelLanes) -> None:
    """The garbage collector may run in a thread that closing waits for."""
    if threading.current_thread() is threading.main_thread():
        lane.close()
    else:
        threading.Thread(target=lane.close, name="close lane").start()


def _new_id() -> str:
    return uuid.uuid4().hex[:12]

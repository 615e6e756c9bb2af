"""`LLM`: a model in a script, without a server. vLLM's offline classes, with the same arguments and results.

One rank runs inside the script's own process (local_lane.py); more become Ray actors of one lane, without Ray Serve
(ray_lane.py). Either way it is the engine that serves, so the answers are the same.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from stagemesh.config.capacity import capacity_line
from stagemesh.config.engine import EngineArgs, EngineConfig, find_model
from stagemesh.config.errors import ConfigError
from stagemesh.config.generation_config import default_sampling
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.ingress.choice import Choice
from stagemesh.deployments.ingress.limits import check_params, check_prompt
from stagemesh.deployments.offline.answers import GrowingChoice, RequestState
from stagemesh.deployments.offline.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from stagemesh.deployments.openai.embeddings import vector_of
from stagemesh.stages.engine.engine import Engine, TokenSink
from stagemesh.stages.engine.lane import Lane
from stagemesh.stages.engine.logits_processor import bad_words_token_ids
from stagemesh.stages.messages.request import EngineRequest, LaneStats, TokenDelta
from stagemesh.stages.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
Message = Mapping[str, Any]
Vector = npt.NDArray[np.float32]
ProgressBar = Callable[..., Any]

IGNORED_VLLM_ARGS = {
    "async_scheduling",
    "compilation_config",
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "distributed_executor_backend",
    "enable_chunked_prefill",
    "enforce_eager",
    "load_format",
    "max_seq_len_to_capture",
    "runner",
    "swap_space",
    "task",
    "tokenizer_mode",
    "trust_remote_code",
}
"""vLLM's arguments that say how it should work inside, not what to answer: taken, and logged as unused."""
DTYPES = {"half": "float16", "float": "float32"}
"""vLLM's other names for them."""


class LaneFailed(RuntimeError):
    """The lane can run no further step. The message names the rank and the cause."""


class OfflineLane(Lane, Protocol):
    engine: Engine


class LLM:
    """A model, loaded once for any number of calls.

    Calls return when every prompt is answered, results in the order of the prompts. `close()`, a `with` block, or
    letting go of the object ends its threads and processes.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: Any = "auto",
        seed: int | None = 0,
        **engine_args: Any,
    ) -> None:
        """Load `model`, a folder or a hub id. Raises ConfigError naming whatever cannot work.

        tokenizer: another folder to take the tokenizer from. seed: fixes the answers of requests that have no seed
        of their own; None draws one. engine_args: fields of `config.engine.EngineArgs`, under vLLM's names
        (`tensor_parallel_size`, `pipeline_parallel_size`, `gpu_memory_utilization`, `max_model_len`, …).
        """
        self.config = EngineConfig.resolve(_engine_args(model, dtype, seed, engine_args))
        self._tokenizer = Tokenizer.from_folder(find_model(tokenizer) if tokenizer else self.config.model_path)
        self._seeds = random.Random(seed)
        self._inbox = _Inbox()
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
        """What a call without `sampling_params` uses: the defaults of the model, where it has some."""
        return SamplingParams(**default_sampling(self.config))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
    ) -> list[RequestOutput]:
        """Answer every prompt.

        sampling_params: one for all, or one per prompt. Raises ConfigError naming the prompt that cannot run,
        before any of them does, and LaneFailed with rank and cause when the lane breaks.
        """
        texts, token_ids = self._tokenize(_as_list(prompts))
        return self._run(texts, token_ids, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue one conversation, or each of several, by the model's chat template."""
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        texts: list[str | None] = [
            self._tokenizer.render_chat(
                conversation, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )
            for conversation in conversations
        ]
        # The template wrote the special tokens.
        token_ids = [self._tokenizer.encode(text or "", add_special_tokens=False) for text in texts]
        return self._run(texts, token_ids, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, of length 1 unless `pooling_params` say otherwise."""
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
    ) -> list[PoolingRequestOutput]:
        """What `embed` gives, as torch tensors."""
        import torch

        return [
            PoolingRequestOutput(id, PoolingOutput(torch.from_numpy(vector)), ids, num_cached_tokens=cached)
            for id, vector, ids, cached in self._pool(prompts, pooling_params, use_tqdm)
        ]

    # -- one call ----------------------------------------------------------------------------------------

    def _tokenize(self, prompts: Sequence[Prompt]) -> tuple[list[str | None], list[list[int]]]:
        texts, token_ids = [], []
        for i, prompt in enumerate(prompts):
            text, ids = _text_and_ids(i, prompt)
            texts.append(text)
            token_ids.append(self._tokenizer.encode(text or "") if ids is None else ids)
        return texts, token_ids

    def _run(
        self,
        texts: list[str | None],
        token_ids: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool | ProgressBar,
    ) -> list[RequestOutput]:
        each = self._params_of_each(params, len(texts))
        self._check_prompts(token_ids, room_for_answer=1)
        for asked in each:
            check_params(asked, self.config.model.vocab_size)
        call = uuid.uuid4().hex[:12]
        answers = []
        for i, (text, ids, asked) in enumerate(zip(texts, token_ids, each, strict=True)):
            id = f"{call}-{i}"
            answers.append(RequestState(id, text, ids, self._choices(id, ids, asked)))
        running = {choice.choice.request_id: (answer, choice) for answer in answers for choice in answer.choices}
        starts = [(id, answer.prompt_token_ids, choice.choice.params) for id, (answer, choice) in running.items()]
        with _progress(use_tqdm, len(answers)) as bar, self._requests(call, starts) as arriving:
            while running:
                delta = next(arriving)
                if delta.request_id not in running:
                    continue  # came after the answer had reached its stop string
                answer, choice = running[delta.request_id]
                choice.accept(delta)
                answer.tick()
                if not choice.is_finished:
                    continue
                if delta.finish_reason is None:
                    self._lane.engine.abort(delta.request_id)  # a stop string, which the engine does not see
                del running[delta.request_id]
                if answer.is_finished:
                    bar.update()
        return [answer.output(self._tokenizer) for answer in answers]

    def _pool(
        self, prompts: Any, params: PoolingParams | None, use_tqdm: bool | ProgressBar
    ) -> list[tuple[str, Vector, list[int], int]]:
        """(request id, vector, token ids, cached tokens) of each prompt."""
        _, token_ids = self._tokenize(_as_list(prompts))
        self._check_prompts(token_ids, room_for_answer=0)
        call = uuid.uuid4().hex[:12]
        asked = SamplingParams(max_tokens=1, temperature=0.0, seed=0, pooling=params or PoolingParams())
        starts = [(f"{call}-{i}", ids, asked) for i, ids in enumerate(token_ids)]
        found: dict[str, TokenDelta] = {}
        with _progress(use_tqdm, len(starts)) as bar, self._requests(call, starts) as arriving:
            while len(found) < len(starts):
                delta = next(arriving)
                found[delta.request_id] = delta
                bar.update()
        return [
            (id, np.frombuffer(vector_of(found[id]), np.float32).copy(), ids, found[id].num_cached_tokens)
            for id, ids, _ in starts
        ]

    def _check_prompts(self, prompts: list[list[int]], room_for_answer: int) -> None:
        for i, token_ids in enumerate(prompts):
            check_prompt(
                f"prompts[{i}]",
                token_ids,
                vocab_size=self.config.model.vocab_size,
                max_model_len=self.config.max_model_len,
                room_for_answer=room_for_answer,
            )

    def _params_of_each(self, params: Any, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        each = list(params)
        if len(each) != count:
            raise ConfigError("sampling_params", len(each), f"must be one, or as many as there are prompts ({count})")
        return each

    def _choices(self, id: str, prompt: list[int], params: SamplingParams) -> list[GrowingChoice]:
        """The `n` answers that a prompt gets, none begun."""
        words = bad_words_token_ids(params.bad_words, partial(self._tokenizer.encode, add_special_tokens=False))
        params = msgspec.structs.replace(params, bad_words_token_ids=words)
        growing = []
        for i in range(params.n):
            seed = params.seed_of_choice(i)
            own = msgspec.structs.replace(params, seed=self._seeds.getrandbits(63) if seed is None else seed)
            detokenizer = self._tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
            growing.append(GrowingChoice(Choice(i, f"{id}-{i}", prompt, own, detokenizer)))
        return growing

    @contextmanager
    def _requests(
        self, call: str, starts: Iterable[tuple[str, list[int], SamplingParams]]
    ) -> Iterator[Iterator[TokenDelta]]:
        """Start requests and iterate over what comes of them, or raise why nothing will. On leaving, those that still
        run are aborted."""
        engine = self._lane.engine
        arriving = self._inbox.open(call)
        started = []
        try:
            for request_id, prompt, params in starts:
                started.append(request_id)
                done = engine.generate(EngineRequest(request_id, prompt, params, call))
                done.add_done_callback(lambda done: arriving.put(error) if (error := done.exception()) else None)  # type: ignore[arg-type]
            yield _arrivals(arriving)
        finally:
            self._inbox.close(call)
            for request_id in started:
                engine.abort(request_id)


class _Inbox(TokenSink):
    """Tokens on their way from the engine's thread to the calls that wait for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[str, queue.SimpleQueue[TokenDelta | Exception]] = {}
        self._failure: LaneFailed | None = None

    def open(self, call: str) -> queue.SimpleQueue[TokenDelta | Exception]:
        with self._lock:
            if self._failure is not None:
                raise LaneFailed(str(self._failure))
            return self._calls.setdefault(call, queue.SimpleQueue())

    def close(self, call: str) -> None:
        with self._lock:
            self._calls.pop(call, None)

    def fail(self, failure: LaneFailed) -> None:
        """The first failure is the one that every call gets: what follows from it is not news."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
                for arriving in self._calls.values():
                    arriving.put(failure)

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        arriving = self._calls.get(reply_to)
        if arriving is None:
            return False
        for delta in deltas:
            arriving.put(delta)
        return True

    def publish(self, stats: LaneStats) -> None:
        pass


def _arrivals(arriving: queue.SimpleQueue[TokenDelta | Exception]) -> Iterator[TokenDelta]:
    while True:
        delta = arriving.get()
        if isinstance(delta, Exception):
            raise delta
        yield delta


def _engine_args(model: str, dtype: Any, seed: int | None, given: Mapping[str, Any]) -> EngineArgs:
    unused = sorted(IGNORED_VLLM_ARGS & given.keys())
    if unused:
        logger.info("without effect here: %s", ", ".join(unused))
    # None is vLLM's word for "as you think best"; a torch.dtype prints as its name.
    args = {name: value for name, value in given.items() if name not in IGNORED_VLLM_ARGS and value is not None}
    dtype = str(dtype).removeprefix("torch.")
    return EngineArgs(model=model, dtype=DTYPES.get(dtype, dtype), seed=seed, **args)


def _start_lane(config: EngineConfig, inbox: _Inbox) -> OfflineLane:
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
    """The garbage collector may run in the very threads that closing waits for."""
    if threading.current_thread() is threading.main_thread():
        lane.close()
    else:
        threading.Thread(target=lane.close, name="close lane").start()


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several. A list of numbers is one prompt, as token ids."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _text_and_ids(i: int, prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """A prompt as what it is: text to be tokenized, or token ids with or without their text."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, list(prompt)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise ConfigError(f"prompts[{i}]", dict(prompt), "must hold 'prompt' or 'prompt_token_ids'")
    return text, None if ids is None else list(ids)


@contextmanager
def _progress(use_tqdm: bool | ProgressBar, total: int) -> Iterator[Any]:
    """A progress bar over prompts: tqdm, another of its kind, or none."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    bar = make(total=total, desc="Processed prompts", dynamic_ncols=True, disable=not use_tqdm)
    try:
        yield bar
    finally:
        bar.close()

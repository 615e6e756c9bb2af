"""The API without Ray: a tiny tokenizer, lanes that say what a test tells them, and a service over both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc
import pytest
import tokenizers
from grpc_health.v1 import health_pb2_grpc
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.ingress.grpc import GrpcApi
from stagemesh.deployments.ingress.lanes import LaneClientCounts
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.proto import grpc_predict_v2_pb2_grpc, inference_pb2_grpc
from stagemesh.stages.messages.request import EngineRequest, LaneError, LaneStats, TokenDelta
from stagemesh.stages.text.tokenizer import Tokenizer

EOS = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ prefill or '' }}{% endif %}"
)


class FakeLanes:
    """Answers every request with `answer`, one token per delta, as a leader would. A LaneClient."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos = tokenizer.encode(EOS, add_special_tokens=False)[0]
        self.answer = "Hello, world"
        self.deltas: list[TokenDelta] | None = None
        """Sent as they are, in place of `answer`."""
        self.error: Exception | None = None
        """Raised after the last delta, or at once where there is none."""
        self.pause_after: int | None = None
        """Deltas after which to wait until `resume` is set."""
        self.resume = asyncio.Event()
        self.is_ready = True
        self.num_cached_tokens = 0
        self.calls: list[tuple[list[int], SamplingParams, str]] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        params, request_id = request.params, request.request_id
        self.calls.append((list(request.prompt_token_ids), params, request_id))
        self.running.add(request_id)
        finished = False
        try:
            for i, delta in enumerate(self._deltas(params, request_id)):
                if i == self.pause_after:
                    await self.resume.wait()
                await asyncio.sleep(0)
                finished = delta.finish_reason is not None
                yield delta
            if self.error is not None:
                finished = True
                raise self.error
        finally:
            self.running.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    def _deltas(self, params: SamplingParams, request_id: str) -> list[TokenDelta]:
        if self.deltas is not None:
            return self.deltas
        if self.error is not None and self.pause_after is None:
            return []
        if params.pooling is not None:
            return [TokenDelta(request_id, 0, [], "stop", embedding=bytes(4 * 8))]
        token_ids = [*self.tokenizer.encode(self.answer, add_special_tokens=False), self.eos]
        deltas = []
        for offset, token_id in enumerate(token_ids[: params.max_tokens]):
            delta = TokenDelta(request_id, offset, [token_id])
            if token_id == self.eos:
                delta.finish_reason, delta.stop_token_id = "stop", token_id
            elif offset + 1 == params.max_tokens:
                delta.finish_reason = "length"
            if offset == 0:
                delta.num_cached_tokens = self.num_cached_tokens
            deltas.append(delta)
        return deltas

    def counts(self) -> LaneClientCounts:
        return LaneClientCounts(resumed=3, dropped=5)

    def lane_stats(self) -> list[LaneStats]:
        return [
            LaneStats(
                lane="lane-a",
                state="serving",
                epoch=1,
                num_running=len(self.running),
                num_waiting=2,
                room=256,
                queued_prefill_tokens=0,
                running_kv_tokens=0,
                num_blocks=100,
                num_free_blocks=75,
                num_preemptions=3,
                prefix_queries=40,
                prefix_hits=30,
                prompt_tokens=50,
                generation_tokens=60,
                num_steps=7,
                schedule_s=0.5,
                step_overhead_s=1.0,
                model_s=3.0,
                block_size=16,
            )
        ]

    def ready(self) -> bool:
        return self.is_ready

    def lose(self) -> None:
        self.error = LaneError("unavailable", "no lane is running")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def one_loop(anyio_backend: str) -> AsyncGenerator[None, None]:
    """Keeps the event loop: gRPC brings what a channel still had to say to the loop that made it, and where that one is
    closed, the error goes to whichever test runs then."""
    yield


@pytest.fixture
async def channel(service: InferenceService, one_loop: None) -> AsyncGenerator[grpc.aio.Channel, None]:
    """To a gRPC server around `service`."""
    api = GrpcApi()
    api.inference_service = service
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(api, server)
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(api, server)
    health_pb2_grpc.add_HealthServicer_to_server(api, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.fixture(scope="session")
def backend() -> tokenizers.Tokenizer:
    """Byte-level BPE with a BOS token in front of plain prompts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|bos|>", EOS, "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Hello, world. What is 17+25?"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return backend


@pytest.fixture(scope="session")
def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, chat_template=TEMPLATE)


@pytest.fixture
def lanes(tokenizer: Tokenizer) -> FakeLanes:
    return FakeLanes(tokenizer)


@pytest.fixture
def service(lanes: FakeLanes, tokenizer: Tokenizer, backend: tokenizers.Tokenizer) -> InferenceService:
    return InferenceService(
        lanes=lanes,
        tokenizer=tokenizer,
        model_names=["tiny", "alias"],
        max_model_len=64,
        vocab_size=backend.get_vocab_size(),
        system_fingerprint="fp_test",
    )

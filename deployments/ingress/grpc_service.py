"""What `stagemesh.v1.Inference` has beside text: vectors, tokens, ends of calls, what is served, how busy it is."""

from __future__ import annotations

import asyncio
from functools import partial

import stagemesh
from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import NO_LIMIT, SamplingParams
from stagemesh.deployments.ingress.grpc_requests import conversation_fields, embedding_fields
from stagemesh.deployments.ingress.grpc_rpc import GrpcContext, Rpcs, unary
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.requests import ChatRequest
from stagemesh.deployments.openai.responses import ModelCard
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.stages.text.input import InputProcessor


class ServiceRpcs(Rpcs):
    @unary(pb.ModelsResponse)
    async def Models(self, request: pb.ModelsRequest, grpc_context: GrpcContext) -> pb.ModelsResponse:
        cards = self.inference_service.models()
        return pb.ModelsResponse(models=[pb.Model(id=card.id, max_model_len=card.max_model_len) for card in cards])

    @unary(pb.AbortResponse)
    async def Abort(self, request: pb.AbortRequest, grpc_context: GrpcContext) -> pb.AbortResponse:
        if not request.request_id:
            raise ConfigError("request_id", "", "must not be empty")
        return pb.AbortResponse(aborted=self.calls.abort(request.request_id))

    @unary(pb.EmbedResponse)
    async def Embed(self, request: pb.EmbedRequest, grpc_context: GrpcContext) -> pb.EmbedResponse:
        with self.calls.enter(request.request_id) as call:
            self.inference_service.check_room()
            body = EmbeddingRequest.parse(embedding_fields(request))
            answer = await call.wait(partial(self.inference_service.embed, body))
        embeddings = []
        for one in answer.data:
            assert isinstance(one.embedding, list)  # not base64
            embeddings.append(pb.Embedding(index=one.index, values=one.embedding))
        usage = pb.Usage(prompt_tokens=answer.usage.prompt_tokens)
        return pb.EmbedResponse(model=answer.model, embeddings=embeddings, usage=usage)

    @unary(pb.TokenizeResponse)
    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: GrpcContext) -> pb.TokenizeResponse:
        model = self._model(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise ConfigError("text", None, "is required, or conversation")
        tokenize = self._tokenize_text if kind == "text" else self._tokenize_conversation
        token_ids = await asyncio.to_thread(tokenize, request)  # a long text would stall every running stream
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.max_model_len)

    @unary(pb.DetokenizeResponse)
    async def Detokenize(self, request: pb.DetokenizeRequest, grpc_context: GrpcContext) -> pb.DetokenizeResponse:
        self._model(request.model)
        vocab_size = self.inference_service.vocab_size
        for i, token_id in enumerate(request.token_ids):
            if token_id >= vocab_size:
                reason = f"is out of vocabulary: token ids must be within [0, {vocab_size})"
                raise ConfigError(f"token_ids[{i}]", token_id, reason)
        decode = self.inference_service.tokenizer.decode
        return pb.DetokenizeResponse(text=decode(request.token_ids, skip_special_tokens=request.skip_special_tokens))

    @unary(pb.ModelInfoResponse)
    async def ModelInfo(self, request: pb.ModelInfoRequest, grpc_context: GrpcContext) -> pb.ModelInfoResponse:
        service = self.inference_service
        model = self._model(request.model)
        return pb.ModelInfoResponse(
            id=model.id,
            max_model_len=model.max_model_len,
            has_chat_template=service.tokenizer.chat_template is not None,
            system_fingerprint=service.system_fingerprint,
            max_request_bytes=service.max_body_bytes,
        )

    @unary(pb.ServerInfoResponse)
    async def ServerInfo(self, request: pb.ServerInfoRequest, grpc_context: GrpcContext) -> pb.ServerInfoResponse:
        service = self.inference_service
        lanes = [
            pb.Lane(
                id=stats.lane,
                state=stats.state,
                num_running=stats.num_running,
                num_waiting=stats.num_waiting,
                kv_cache_tokens=stats.num_blocks * stats.block_size,
                free_kv_cache_tokens=stats.num_free_blocks * stats.block_size,
            )
            for stats in service.lanes.lane_stats()
        ]
        models = [model.id for model in service.models()]
        return pb.ServerInfoResponse(version=stagemesh.__version__, ready=service.ready(), models=models, lanes=lanes)

    def _model(self, name: str) -> ModelCard:
        return self.inference_service.model(name or None)

    def _tokenize_text(self, request: pb.TokenizeRequest) -> list[int]:
        add_special_tokens = request.add_special_tokens or not request.HasField("add_special_tokens")
        return self.inference_service.tokenizer.encode(request.text, add_special_tokens=add_special_tokens)

    def _tokenize_conversation(self, request: pb.TokenizeRequest) -> list[int]:
        fields = conversation_fields(request.conversation)
        if request.conversation.HasField("add_generation_prompt"):
            fields["add_generation_prompt"] = request.conversation.add_generation_prompt
        # Of any length, and without taking a seed from the others.
        counting = InputProcessor(self.inference_service.tokenizer, vocab_size=NO_LIMIT, max_model_len=NO_LIMIT, seed=0)
        return counting.process_chat(ChatRequest.parse(fields).chat_input(), SamplingParams(), "count").token_ids

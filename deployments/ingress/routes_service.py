"""vLLM's routes about the service, its tokens, and requests in other wrappings; KServe's health over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

import stagemesh
from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.errors import report_error
from stagemesh.deployments.ingress.http import JSON, HttpApi, WholeResponse, error_response
from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.deployments.openai.responses import ChatResponse, PromptTokensDetails, Usage
from stagemesh.deployments.openai.schema import OpenAIRequest
from stagemesh.deployments.openai.tokens import (
    BatchChatRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    InvocationRequest,
    TokenizeRequest,
    TokenizeResponse,
    conversation_error,
)


class ServiceRoutes(HttpApi):
    async def tokenize(self, request: Request) -> Response:
        return await self._accept(request, TokenizeRequest, self._tokenize, is_for_lanes=False)

    async def detokenize(self, request: Request) -> Response:
        return await self._accept(request, DetokenizeRequest, self._detokenize, is_for_lanes=False)

    async def invocations(self, request: Request) -> Response:
        async def accept(body: OpenAIRequest) -> Response:
            if isinstance(body, ChatRequest):
                return await self._chat(body)
            if isinstance(body, CompletionRequest):
                return await self._complete(body)
            assert isinstance(body, EmbeddingRequest)
            return await self._embed(body)

        return await self._accept(request, InvocationRequest, accept)

    async def chat_batch(self, request: Request) -> Response:
        return await self._accept(request, BatchChatRequest, self._chat_batch)

    async def version(self, request: Request) -> Response:
        return JSON({"version": stagemesh.__version__})

    async def load(self, request: Request) -> Response:
        """Requests that run or wait, in all lanes."""
        stats = self._service.lanes.lane_stats()
        return JSON({"server_load": sum(lane.num_running + lane.num_waiting for lane in stats)})

    async def ping(self, request: Request) -> Response:
        return PlainTextResponse()

    async def server_metadata(self, request: Request) -> Response:
        return JSON({"name": "stagemesh", "version": stagemesh.__version__, "extensions": []})

    async def live(self, request: Request) -> Response:
        return JSON({"live": True})

    async def server_ready(self, request: Request) -> Response:
        return self._ready({})

    async def model_ready(self, request: Request) -> Response:
        try:
            return self._ready({"name": self._service.model(request.path_params["name"]).id})
        except ConfigError as error:
            return error_response(report_error(error))

    def _ready(self, fields: dict[str, Any]) -> Response:
        """KServe's form of /ready."""
        is_ready = self._service.ready()
        return JSON({**fields, "ready": is_ready}, 200 if is_ready else 503)

    async def _tokenize(self, body: TokenizeRequest) -> Response:
        self._service.model(body.model)
        if body.prompt is not None:
            tokens = await self._service.tokenize(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        else:
            prompt = await self._service.chat_prompt(body.chat())
            tokens = prompt.token_ids
            if body.add_special_tokens and prompt.text is not None:
                tokens = await self._service.tokenize(prompt.text, add_special_tokens=True)
        token_strs = [self._service.tokenizer.token(id) for id in tokens] if body.return_token_strs else None
        return JSON(TokenizeResponse(len(tokens), self._service.max_model_len, tokens, token_strs))

    async def _detokenize(self, body: DetokenizeRequest) -> Response:
        self._service.model(body.model)
        vocab_size = self._service.vocab_size
        for i, token_id in enumerate(body.tokens):
            if not 0 <= token_id < vocab_size:
                raise ConfigError(f"tokens[{i}]", token_id, f"token ids must be within [0, {vocab_size})")
        return JSON(DetokenizeResponse(self._service.tokenizer.decode(body.tokens, skip_special_tokens=False)))

    async def _chat_batch(self, body: BatchChatRequest) -> Response:
        chats = body.chats()
        streams: list[GenerationStream] = []
        for i, chat in enumerate(chats):  # where one is refused, the others give their places back and none runs
            try:
                streams.append(await self._service.chat(chat, i))
            except ConfigError as error:
                raise conversation_error(i, error) from None

        async def collected() -> ChatResponse:
            try:
                async with asyncio.TaskGroup() as group:
                    for stream in streams:
                        group.create_task(stream.collect())
            except ExceptionGroup as errors:  # the first is the cause
                raise errors.exceptions[0] from None
            answers = [self._chat_answer(chat, stream) for chat, stream in zip(chats, streams, strict=True)]
            choices = [msgspec.structs.replace(one.choices[0], index=i) for i, one in enumerate(answers)]
            usage = _sum([stream.usage for stream in streams])
            return msgspec.structs.replace(answers[0], choices=choices, usage=usage)

        return WholeResponse(collected, error_response)


def _sum(usages: list[Usage]) -> Usage:
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    cached_tokens = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, completion_tokens, total, PromptTokensDetails(cached_tokens))

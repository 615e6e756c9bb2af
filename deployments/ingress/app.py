"""All routes, as a Starlette app around an InferenceService."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from stagemesh.deployments.anthropic.messages import (
    CountTokensRequest,
    Message,
    MessagesRequest,
    TokenCount,
    anthropic_error,
)
from stagemesh.deployments.ingress.errors import openai_error
from stagemesh.deployments.ingress.http import JSON
from stagemesh.deployments.ingress.openapi import Endpoint, MessagesError, document
from stagemesh.deployments.ingress.request_id import RequestIds
from stagemesh.deployments.ingress.routes_messages import MessagesRoutes
from stagemesh.deployments.ingress.routes_responses import ResponsesResponse, ResponsesRoutes
from stagemesh.deployments.ingress.routes_service import ServiceRoutes
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.openai.embeddings import EmbeddingRequest, EmbeddingResponse
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.deployments.openai.responses import ChatResponse, CompletionResponse, ModelCard, ModelList
from stagemesh.deployments.openai.responses_request import ResponsesRequest
from stagemesh.deployments.openai.tokens import (
    BatchChatRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)

POST, PING = ("POST",), ("GET", "POST")
STATUS = dict[str, str | bool]


def build_http_app(service: InferenceService, middleware: Sequence[Middleware] = ()) -> Starlette:
    """Errors, those of routing too, have the shape of the route's API.

    middleware: what auth.py makes of the configuration.
    """
    endpoints = [*_generation(service), *_about(service)]

    @cache
    def description() -> dict[str, Any]:
        return document(endpoints)

    async def openapi(request: Request) -> Response:
        return JSON(description())

    endpoints.append(Endpoint(path="/openapi.json", handler=openapi, summary="This document", gives=dict[str, Any]))
    return Starlette(
        routes=[endpoint.route() for endpoint in endpoints],
        exception_handlers={HTTPException: _routing_error},
        middleware=[Middleware(RequestIds), *middleware],
    )


def _generation(service: InferenceService) -> list[Endpoint]:
    """What lanes compute."""
    api, responses, messages = ServiceRoutes(service), ResponsesRoutes(service), MessagesRoutes(service)
    return [
        Endpoint(path="/v1/completions", handler=api.completions, methods=POST, summary="Continue texts",
                 takes=CompletionRequest, gives=CompletionResponse, streams=True, needs_lanes=True),
        Endpoint(path="/v1/chat/completions", handler=api.chat_completions, methods=POST, takes=ChatRequest,
                 gives=ChatResponse, streams=True, needs_lanes=True, summary="Answer a conversation"),
        Endpoint(path="/v1/chat/completions/batch", handler=api.chat_batch, methods=POST, takes=BatchChatRequest,
                 gives=ChatResponse, needs_lanes=True, summary="Answer several conversations"),
        Endpoint(path="/v1/responses", handler=responses.responses, methods=POST, takes=ResponsesRequest,
                 gives=ResponsesResponse, streams=True, needs_lanes=True,
                 summary="Answer a conversation, in OpenAI's newer form"),
        Endpoint(path="/v1/messages", handler=messages.messages, methods=POST, takes=MessagesRequest, gives=Message,
                 streams=True, error=MessagesError, needs_lanes=True,
                 summary="Answer a conversation, in Anthropic's form"),
        Endpoint(path="/v1/messages/count_tokens", handler=messages.count_tokens, methods=POST,
                 takes=CountTokensRequest, gives=TokenCount, error=MessagesError,
                 summary="Count a conversation's tokens, in Anthropic's form"),
        Endpoint(path="/v1/embeddings", handler=api.embeddings, methods=POST, takes=EmbeddingRequest,
                 gives=EmbeddingResponse, needs_lanes=True, summary="Vectors of texts"),
        Endpoint(path="/invocations", handler=api.invocations, methods=POST, streams=True,
                 needs_lanes=True, takes=(ChatRequest, CompletionRequest, EmbeddingRequest),
                 gives=(ChatResponse, CompletionResponse, EmbeddingResponse), summary="SageMaker's route for all"),
    ]  # fmt: skip


def _about(service: InferenceService) -> list[Endpoint]:
    """Tokens, models and health."""
    api = ServiceRoutes(service)
    return [
        Endpoint(path="/tokenize", handler=api.tokenize, methods=POST, takes=TokenizeRequest, gives=TokenizeResponse,
                 summary="Tokens of a text or conversation"),
        Endpoint(path="/detokenize", handler=api.detokenize, methods=POST, takes=DetokenizeRequest,
                 gives=DetokenizeResponse, summary="Text of tokens"),
        Endpoint(path="/v1/models", handler=api.models, gives=ModelList, summary="The served names"),
        Endpoint(path="/v1/models/{name:path}", handler=api.model, gives=ModelCard, summary="A served name"),
        Endpoint(path="/version", handler=api.version, gives=dict[str, str], summary="Version of the server"),
        Endpoint(path="/load", handler=api.load, gives=dict[str, int], summary="Requests that run or wait"),
        Endpoint(path="/ping", handler=api.ping, methods=PING, summary="Whether the server answers"),
        Endpoint(path="/health", handler=api.health, gives=STATUS, error=None, summary="Whether the server answers"),
        Endpoint(path="/ready", handler=api.ready, gives=STATUS, needs_lanes=True,
                 summary="Whether some lane can generate"),
        Endpoint(path="/metrics", handler=api.metrics, summary="Prometheus metrics"),
        Endpoint(path="/v2", handler=api.server_metadata, gives=dict[str, Any], summary="KServe: the server"),
        Endpoint(path="/v2/health/live", handler=api.live, gives=STATUS, summary="KServe: whether the server answers"),
        Endpoint(path="/v2/health/ready", handler=api.server_ready, gives=STATUS, has_unready=True,
                 summary="KServe: whether some lane can generate"),
        Endpoint(path="/v2/models/{name:path}/ready", handler=api.model_ready, gives=STATUS, has_unready=True,
                 summary="KServe: whether some lane can generate"),
    ]  # fmt: skip


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {404: f"{request.url.path} is not served here", 405: f"{request.method} is not allowed here"}
    message = reasons.get(error.status_code, error.detail)
    is_anthropic = request.url.path.startswith("/v1/messages")
    content = anthropic_error(message, error.status_code) if is_anthropic else openai_error(message)
    return JSON(content, error.status_code, headers=error.headers)

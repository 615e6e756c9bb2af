"""All routes, as a Starlette app around an InferenceService."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stagemesh.deployments.ingress.errors import openai_error
from stagemesh.deployments.ingress.http import JSON
from stagemesh.deployments.ingress.routes_messages import MessagesRoutes
from stagemesh.deployments.ingress.routes_responses import ResponsesRoutes
from stagemesh.deployments.ingress.routes_service import ServiceRoutes
from stagemesh.deployments.ingress.service import InferenceService


def build_http_app(service: InferenceService, middleware: Sequence[Middleware] = ()) -> Starlette:
    """Errors, those of routing too, are OpenAI error objects. middleware: what auth.py makes of the configuration."""
    api, responses, messages = ServiceRoutes(service), ResponsesRoutes(service), MessagesRoutes(service)
    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
            Route("/v1/chat/completions/batch", api.chat_batch, methods=["POST"]),
            Route("/v1/responses", responses.responses, methods=["POST"]),
            Route("/v1/messages", messages.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
            Route("/v1/embeddings", api.embeddings, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/invocations", api.invocations, methods=["POST"]),
            Route("/version", api.version, methods=["GET"]),
            Route("/load", api.load, methods=["GET"]),
            Route("/ping", api.ping, methods=["GET", "POST"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/ready", api.ready, methods=["GET"]),
            Route("/metrics", api.metrics, methods=["GET"]),
            Route("/v2", api.server_metadata, methods=["GET"]),
            Route("/v2/health/live", api.live, methods=["GET"]),
            Route("/v2/health/ready", api.server_ready, methods=["GET"]),
            Route("/v2/models/{name:path}/ready", api.model_ready, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _routing_error},
        middleware=list(middleware),
    )


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {404: f"{request.url.path} is not served here", 405: f"{request.method} is not allowed here"}
    message = reasons.get(error.status_code, error.detail)
    return JSON(openai_error(message), error.status_code, headers=error.headers)

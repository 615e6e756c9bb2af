"""The Router deployment: HTTP and gRPC in, lanes behind."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from stagemesh.config.engine import EngineConfig
from stagemesh.config.fingerprint import fingerprint
from stagemesh.config.generation_config import default_sampling
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.auth import ApiKeys, middleware
from stagemesh.deployments.ingress.grpc import GrpcApi
from stagemesh.deployments.ingress.lane_client import RayLaneClient
from stagemesh.deployments.ingress.lane_view import VIEW
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.stages.text.tokenizer import Tokenizer


@serve.ingress()
class Router(GrpcApi):
    """Any number of replicas; they share nothing."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, leaders: DeploymentHandle[Any]
    ) -> None:
        self._lanes = RayLaneClient(leaders, VIEW, config.startup_timeout_s)
        self._lanes.start()
        self.inference_service = InferenceService(
            lanes=self._lanes,
            tokenizer=Tokenizer.from_folder(config.local_tokenizer_path(), config.chat_template),
            model_names=config.served_model_names,
            max_model_len=config.max_model_len,
            vocab_size=config.model.vocab_size,
            sampling_defaults=default_sampling(config),
            seed=config.seed,
            max_num_seqs=config.max_num_seqs,
            max_queued_tokens=config.max_queued_tokens,
            max_request_timeout_s=config.max_request_timeout_s,
            system_fingerprint=fingerprint(config),
            model_root=config.model_name,
            embedding_size=config.model.hidden_size,
            max_logprobs=config.max_logprobs,
            trust_request_chat_template=config.trust_request_chat_template,
            strict_fields=config.strict_fields,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        )

        self.api_keys = ApiKeys(config.api_key_hashes)
        self._middleware = middleware(config)

    async def check_health(self) -> None:
        """Serve replaces a router that tokens or reports no longer reach."""
        self._lanes.check_health()

    def __serve_build_asgi_app__(self) -> Starlette:
        """Serve asks for the HTTP side after the constructor (see `serve.ingress`)."""
        return build_http_app(self.inference_service, self._middleware)

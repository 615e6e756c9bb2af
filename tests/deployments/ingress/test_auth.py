"""API keys on every route and rpc but health's, and CORS."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

import anthropic
import grpc
import httpx
import httpx2
import pytest
from google.protobuf import symbol_database
from support.harness import DEMO

from stagemesh.config.api_keys import key_hash
from stagemesh.config.serve_yaml import GRPC_SERVICERS, render
from stagemesh.deployments.cli.main import engine_args
from stagemesh.deployments.ingress import auth
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.auth import OPEN_PATHS, ApiKeyMiddleware, ApiKeys, Middleware
from stagemesh.deployments.ingress.grpc import GrpcApi
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.deployments.proto import inference_pb2_grpc

pytestmark = pytest.mark.anyio

KEYS = ApiKeys([key_hash("sk-one"), key_hash("sk-two")])
GUARD = [Middleware(ApiKeyMiddleware, keys=KEYS)]


@pytest.fixture
async def http(service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service, GUARD))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("authorization", "right"),
    [
        ("Bearer sk-one", True),
        ("bearer sk-two", True),
        ("Bearer sk-on", False),
        ("Bearer sk-one ", False),
        ("Bearer  sk-one", False),
        ("Basic sk-one", False),
        ("sk-one", False),
        ("Bearer", False),
        ("", False),
        (None, False),
        (f"Bearer {key_hash('sk-one')}", False),
        ("Bearer ü", False),
    ],
)
def test_a_key_is_one_of_those_or_not(authorization, right):
    assert KEYS.accept(authorization) is right
    assert ApiKeys().accept(authorization)


def test_every_known_key_is_compared_in_constant_time(monkeypatch):
    compared: list[str] = []
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: bool(compared.append(b)) or a == b)
    assert KEYS.accept("Bearer sk-one") and hmac is auth.hmac
    assert set(compared) == {key_hash("sk-one"), key_hash("sk-two")}


async def test_every_route_but_health_needs_a_key(service, http, lanes):
    for route in build_http_app(service).routes:
        path = route.path.replace("{name:path}", "tiny")
        for method in route.methods:
            response = await http.request(method, path)
            is_open = path in OPEN_PATHS
            assert (response.status_code == 401) is not is_open, path
            if not is_open:
                assert (await http.request(method, path, headers=bearer("sk-two"))).status_code != 401
    assert lanes.calls == []


@pytest.mark.parametrize(
    "path", ["/nothing", "/health/", "//health", "/health/../v1/models", "/v1/models?/health", "/"]
)
async def test_a_path_like_an_open_one_is_none(http, path):
    assert (await http.get(path)).status_code == 401


async def test_a_refusal_has_the_shape_of_its_api(http):
    answer = await http.post("/v1/completions", content=b"not read")
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    answer = await http.post("/v1/messages")
    assert answer.json()["error"]["type"] == "authentication_error"
    assert (await http.get("/v1/models", headers={"x-api-key": "sk-one"})).status_code == 401


async def test_the_body_is_not_read_before_the_key(service):
    async def receive() -> dict[str, Any]:
        raise AssertionError("read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await build_http_app(service, GUARD)(scope, receive, send)
    assert sent[0]["status"] == 401


async def test_the_anthropic_client_sends_its_key_its_way(service, lanes):
    transport = httpx2.ASGITransport(build_http_app(service, GUARD))
    async with httpx2.AsyncClient(transport=transport) as http:
        for key, right in (("sk-one", True), ("sk-three", False)):
            client = anthropic.AsyncAnthropic(base_url="http://test", api_key=key, http_client=http, max_retries=0)
            asking = client.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "Hi"}])
            if right:
                assert (await asking).content[0].text == lanes.answer
            else:
                with pytest.raises(anthropic.AuthenticationError):
                    await asking


async def test_a_page_of_an_allowed_origin_may_ask_without_a_key_what_it_may_send(service, http):
    cors = Middleware(auth.CORSMiddleware, allow_origins=["https://a"], allow_methods=["*"], allow_headers=["*"])
    asking = {"origin": "https://a", "access-control-request-method": "POST"}
    transport = httpx.ASGITransport(build_http_app(service, [cors, *GUARD]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.options("/v1/completions", headers=asking)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a")
        refused = await client.post("/v1/completions", headers={"origin": "https://a"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a")
    without = await http.options("/v1/completions", headers=asking)
    assert without.status_code == 405 and "access-control-allow-origin" not in without.headers


def test_the_file_that_serve_writes_has_hashes_and_no_key(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("sk-file")
    monkeypatch.setenv("VLLM_API_KEY", "sk-environment")
    args = engine_args(str(DEMO), {"api_key": ["sk-flag"], "api_key_file": str(tmp_path / "keys"), "device": "cpu"})
    text = render(args, host="", port=1, grpc_port=2)
    assert "sk-" not in text and "api_key_file" not in text
    assert {f"sha256:{key_hash(f'sk-{name}')}" for name in ("file", "environment", "flag")} == set(args["api_key"])


# ---- gRPC


def rpcs() -> list[tuple[str, Any]]:
    """Of all services that Serve is told of."""
    for servicer in GRPC_SERVICERS:
        import_module(servicer.partition(":")[0])
    pool = symbol_database.Default().pool
    names = ("stagemesh.v1.Inference", "inference.GRPCInferenceService", "grpc.health.v1.Health")
    assert len(names) == len(GRPC_SERVICERS)
    return [(name, method) for name in names for method in pool.FindServiceByName(name).methods]


@pytest.mark.parametrize(("service_name", "method"), rpcs(), ids=lambda value: getattr(value, "name", str(value)))
async def test_every_rpc_but_health_needs_a_key(channel, monkeypatch, service_name, method):
    monkeypatch.setattr(GrpcApi, "api_keys", KEYS)
    serialize = lambda message: message.SerializeToString()  # noqa: E731
    call = channel.unary_stream(f"/{service_name}/{method.name}", request_serializer=serialize)
    answer = call(pb.ModelsRequest())
    if service_name == "grpc.health.v1.Health":
        assert await answer.read()
        answer.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for message in answer:
                assert message == b"", "nothing is told with the refusal"
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_rpc_with_a_key_is_served(channel, monkeypatch, lanes):
    monkeypatch.setattr(GrpcApi, "api_keys", KEYS)
    stub = inference_pb2_grpc.InferenceStub(channel)
    metadata = (("authorization", "Bearer sk-two"),)
    answer = await stub.Generate(pb.GenerateRequest(text="Hi"), metadata=metadata)
    assert answer.choices[0].text == lanes.answer
    chunks = [chunk async for chunk in stub.GenerateStream(pb.GenerateRequest(text="Hi"), metadata=metadata)]
    assert "".join(chunk.text for chunk in chunks) == lanes.answer


async def test_an_rpc_that_a_subclass_adds_needs_a_key_too():
    class More(GrpcApi):
        api_keys = KEYS

        async def Secret(self, request: Any, grpc_context: Any) -> pb.ModelsResponse:
            raise AssertionError("reached")

    class Context:
        code = None

        def invocation_metadata(self) -> list[tuple[str, str]]:
            return []

        def set_code(self, code: Any) -> None:
            self.code = code

        def set_details(self, details: str) -> None: ...

    context = Context()
    assert await More().Secret(None, context) == pb.ModelsResponse()
    assert context.code is grpc.StatusCode.UNAUTHENTICATED

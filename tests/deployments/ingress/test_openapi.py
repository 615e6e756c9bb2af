"""/openapi.json is true: every route is in it, and what a route takes and gives has the schema that it says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.middleware import Middleware

from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.auth import ApiKeyMiddleware, ApiKeys
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.stages.messages.request import LaneError

pytestmark = pytest.mark.anyio

USER = [{"role": "user", "content": "Hi"}]
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": USER},
    "/v1/chat/completions/batch": {"messages": [USER]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"model": "tiny", "max_tokens": 5, "messages": USER},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": USER},
    "/v1/embeddings": {"input": "Hi"},
    "/invocations": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
    "/ping": {},
}
LANE_PATHS = EXAMPLES.keys() - {"/v1/messages/count_tokens", "/tokenize", "/detokenize", "/ping"}


@pytest.fixture
async def http(service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def document(http) -> dict[str, Any]:
    content: dict[str, Any] = (await http.get("/openapi.json")).json()
    return content


def check(document: dict[str, Any], operation: dict[str, Any], response: httpx.Response) -> None:
    """The answer has the schema of its status."""
    described = operation["responses"][str(response.status_code)]
    kind = response.headers.get("content-type", "text/plain").partition(";")[0]
    assert kind in described["content"]
    if kind == "application/json":
        schema = {**described["content"][kind]["schema"], "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(response.json())


async def test_every_route_is_described_and_nothing_else(service, document):
    routes = {(r.path.replace(":path", ""), m) for r in build_http_app(service).routes for m in r.methods - {"HEAD"}}
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described | {("/openapi.json", "GET")} == routes | {("/openapi.json", "GET")}
    assert {path for path, method in routes if method == "POST"} == EXAMPLES.keys()


async def test_every_reference_leads_somewhere(document):
    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [ref for item in value for ref in references(item)]
        if not isinstance(value, dict):
            return []
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + references(list(value.values()))

    names = {ref.removeprefix("#/components/schemas/") for ref in references(document)}
    assert names and names <= document["components"]["schemas"].keys()
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_every_route_gives_what_it_says(http, document, lanes):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            url, body = path.replace("{name}", "tiny"), EXAMPLES.get(path)
            response = await http.request(method, url, json=body if method == "post" else None)
            assert response.status_code == 200, (path, response.text)
            check(document, operation, response)
            if method == "post" and "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(body)
                refused = await http.post(url, content=b"{")
                assert refused.status_code == 400
                check(document, operation, refused)
                if "text/event-stream" in operation["responses"]["200"]["content"]:
                    check(document, operation, await http.post(url, json={**(body or {}), "stream": True}))


async def test_what_is_not_ready_gives_what_it_says_too(http, document, lanes):
    lanes.is_ready = False
    for path in ("/ready", "/v2/health/ready", "/v2/models/{name}/ready"):
        response = await http.get(path.replace("{name}", "tiny"))
        assert response.status_code == 503
        check(document, document["paths"][path]["get"], response)


@pytest.mark.parametrize(
    "status, code", [("unavailable", 503), ("overloaded", 429), ("timeout", 408), ("internal", 500)]
)
async def test_what_a_lane_fails_with_is_described(http, document, lanes, status, code):
    lanes.error = LaneError(status, "why")
    for path in LANE_PATHS:
        response = await http.post(path, json=EXAMPLES[path])
        assert response.status_code == code, path
        check(document, document["paths"][path]["post"], response)


async def test_refusals_of_a_body_are_described(http, document, monkeypatch):
    monkeypatch.setattr(InferenceService, "max_body_bytes", 5)
    for path in EXAMPLES.keys() - {"/ping"}:
        operation = document["paths"][path]["post"]
        for content, headers, code in ((b"123456", {}, 413), (b"a", {"content-type": "text/plain"}, 415)):
            response = await http.post(path, content=content, headers=headers)
            assert response.status_code == code, path
            check(document, operation, response)


async def test_who_needs_a_key_is_described(service, document):
    layers = [Middleware(ApiKeyMiddleware, keys=ApiKeys(["0" * 64]))]
    transport = httpx.ASGITransport(build_http_app(service, layers))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                response = await client.request(method, path.replace("{name}", "tiny"))
                assert (response.status_code == 401) == ("security" in operation), path
                check(document, operation, response)


async def test_an_unknown_model_is_described(http, document):
    for path in EXAMPLES.keys() - {"/ping"}:
        response = await http.post(path, json={**EXAMPLES[path], "model": "unknown"})
        assert response.status_code == 404, path
        check(document, document["paths"][path]["post"], response)
    for path in ("/v1/models/{name}", "/v2/models/{name}/ready"):
        response = await http.get(path.replace("{name}", "unknown"))
        assert response.status_code == 404
        check(document, document["paths"][path]["get"], response)

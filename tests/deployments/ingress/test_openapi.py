"""/openapi.json is true: every route is in it, and what a route takes and gives has the schema that it says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import pytest

from stagemesh.deployments.ingress.app import build_http_app

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
    status = str(response.status_code)
    described = operation["responses"].get(status) or operation["responses"][f"{status[0]}XX"]
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

"""/v1/embeddings, with OpenAI's own client and without."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from stagemesh.config.sampling import SamplingParams
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.stages.messages.request import EngineRequest, LaneError, LaneStats, TokenDelta

pytestmark = pytest.mark.anyio


class Lanes:
    """Gives each prompt the vector (number of tokens, 0.5). A LaneClient."""

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []
        self.error: Exception | None = None

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        self.asked.append(request.params)
        if self.error is not None:
            raise self.error
        vector = struct.pack("<2f", len(request.prompt_token_ids), 0.5)
        yield TokenDelta(request.request_id, 0, [], "stop", embedding=vector)

    def lane_stats(self) -> list[LaneStats]:
        return []

    def ready(self) -> bool:
        return True


@pytest.fixture
def lanes() -> Lanes:
    return Lanes()


@pytest.fixture
async def http(service: InferenceService) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def post(http: httpx.AsyncClient, **body: Any) -> Any:
    response = await http.post("/v1/embeddings", json=body)
    return response.json() | {"status": response.status_code}


async def test_openais_client_gets_a_vector_per_text_in_order(http: httpx.AsyncClient, tokenizer: Any) -> None:
    texts = ["Hello", "Hello, world", "What is 17+25?"]
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http) as client:
        answer = await client.embeddings.create(model="tiny", input=texts)
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert [item.embedding for item in answer.data] == [[float(n), 0.5] for n in lengths]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("tiny", sum(lengths), sum(lengths))


async def test_a_vector_is_numbers_or_base64_of_float32(http: httpx.AsyncClient) -> None:
    numbers = await post(http, input=[1, 2, 3])
    assert numbers["object"] == "list"
    assert numbers["data"] == [{"index": 0, "embedding": [3.0, 0.5], "object": "embedding"}]
    packed = await post(http, input=[[1, 2, 3]], encoding_format="base64")
    assert struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"])) == (3.0, 0.5)


async def test_pooling_is_asked_for_as_the_request_says(http: httpx.AsyncClient, lanes: Lanes) -> None:
    await post(http, input="Hello")
    await post(http, input="Hello", pooling="mean", normalize=False, dimensions=2)
    asked = [params.pooling for params in lanes.asked]
    assert asked[0] is not None and (asked[0].pooling, asked[0].normalize, asked[0].dimensions) == ("last", True, None)
    assert asked[1] is not None and (asked[1].pooling, asked[1].normalize, asked[1].dimensions) == ("mean", False, 2)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["Hello", []]}, 400, "input"),
        ({"input": [[1], []]}, 400, "input[1]"),
        ({"input": ""}, 400, "input"),
        ({"input": ["Hello", ""]}, 400, "input[1]"),
        ({"input": [9999]}, 400, "input"),
        ({"input": [1] * 65}, 400, "input"),
        ({"input": "Hello", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "Hello", "dimensions": 0}, 400, "dimensions"),
        ({"input": "Hello", "dimensions": 2**31}, 400, "dimensions"),
        ({"input": "Hello", "messages": [{"role": "user", "content": "Hi"}]}, 400, "messages"),
        ({"messages": [{"role": "judge", "content": "Hi"}]}, 400, "messages"),
        ({"input": "Hello", "truncate_prompt_tokens": 65}, 400, "truncate_prompt_tokens"),
        ({"input": "Hello", "model": "other"}, 404, "model"),
    ],
)
async def test_what_is_wrong_is_named(http: httpx.AsyncClient, body: Any, status: int, param: str) -> None:
    answer = await post(http, **body)
    assert (answer["status"], answer["error"]["param"]) == (status, param)


async def test_a_prompt_may_be_as_long_as_the_model_for_it_needs_no_answer(http: httpx.AsyncClient) -> None:
    assert (await post(http, input=[1] * 64))["usage"]["prompt_tokens"] == 64


async def test_a_body_that_is_no_json_is_refused(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/embeddings", content=b"{")).status_code == 400
    assert (await http.post("/v1/embeddings", content=b"[]")).status_code == 400


async def test_a_lane_that_is_lost_is_a_503(http: httpx.AsyncClient, lanes: Lanes) -> None:
    lanes.error = LaneError("lost", "the lane is gone")
    assert (await post(http, input=["a", "b"]))["status"] == 503

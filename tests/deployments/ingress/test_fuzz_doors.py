"""Whatever a client sends, over HTTP or gRPC: an answer or an error that names what is wrong, never a bug of ours."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.openai.embeddings import EmbeddingRequest
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.deployments.openai.schema import OpenAIRequest
from stagemesh.deployments.proto import inference_pb2 as pb

pytestmark = pytest.mark.anyio

NUM_BODIES, NUM_MESSAGES = 8_000, 4_000
AT_ONCE = 16

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
SHARED = {
    "max_tokens": 4, "min_tokens": 0, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1,
    "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True, "skip_special_tokens": True,
    "include_stop_str_in_output": False, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0}, "allowed_token_ids": [5, 6], "bad_words": ["bad"], "return_token_ids": True, "n": 2,
    "stream": True, "stream_options": {"include_usage": True}, "timeout": 30.0, "priority": 1, "user": "me",
    "model": "tiny", "structured_outputs": {"json": {"type": "object"}}, "response_format": {"type": "text"},
    "metadata": {}, "echo": True, "best_of": 2, "truncate_prompt_tokens": 2, "truncation_side": "right",
    "cache_salt": "s", "return_tokens_as_token_ids": True, "use_beam_search": False, "request_id": "r", "unknown": 1,
}  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {**SHARED, "prompt": "Hi", "logprobs": 1, "logprob_token_ids": [5]},
    "/v1/chat/completions": {
        **SHARED,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "logprobs": True, "top_logprobs": 1, "tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True,
        "chat_template_kwargs": {"a": 1}, "max_completion_tokens": 3, "add_generation_prompt": True,
        "continue_final_message": False, "reasoning_effort": "low", "documents": [{"a": "b"}], "chat_template": None,
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 4, "pooling": "mean",
                       "normalize": True, "add_special_tokens": True, "model": "tiny", "timeout": 30, "priority": 0},
}  # fmt: skip


class Raw(float):
    """Written into JSON as it is."""

    def __new__(cls, text: str) -> Raw:
        number = super().__new__(cls, "nan")
        number.text = text  # type: ignore[attr-defined]
        return number

    def __repr__(self) -> str:
        return str(self.text)  # type: ignore[attr-defined]


def nested(depth: int) -> Raw:
    return Raw('{"a":[' * depth + "1" + "]}" * depth)


EDGES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64 - 1,
    2**64, 10**30, 10**400, -0.0, 0.1, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), Raw("1e999"),
    Raw("-1e999"), Raw("NaN"), Raw("1" * 5000), Raw('"\\ud800"'), Raw('"\\udfff\\ud800x"'), "", " ", "\x00",
    "\U0010ffff", "ﷺ" * 50, "a" * 3000, "tiny", "none", "required", [], {}, [[]], [{}], [None], [True], [""],
    ["", "a"], [0], [-1], [2**31], [2**64], [1.5], [[1], [2]], [[1], "a"], [1] * 2000, ["a"] * 300, {"": ""},
    {"a": None}, {"-1": 1}, {"1": 1e308}, {"1": Raw("NaN")}, {"²": 1}, {"٣": 1}, {str(2**70): 1},
    {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}, {"type": "json_object"}, {"json": "{"},
    {"json": {"$ref": "#"}}, {"json": {"$ref": "http://x"}}, {"regex": "("}, {"regex": "a{1,99999}"}, {"regex": "\\"},
    {"grammar": "start: x"}, {"grammar": "root ::= \"a\""}, {"choice": []}, {"choice": ["a"]}, {"json_object": True},
    {"type": "function", "function": {"name": "f"}}, [TOOL, TOOL], [{"type": "function", "function": {"name": ""}}],
    [{"role": "user"}], [{"role": "tool", "content": None, "tool_call_id": 3}], [{"role": "judge", "content": "x"}],
    [{"role": "user", "content": "x", "tool_calls": "abc"}], [{"role": "assistant", "tool_calls": [{"function": 3}]}],
    [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 5000}}]}],
    {"messages": 1}, {"tools": 1, "bos_token": 2}, nested(10), nested(90), nested(400), nested(5000),
]  # fmt: skip


FIELD_EDGES = [
    None, True, 0, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, 5.0, 1e308, float("nan"),
    float("inf"), "5", "5.0", "-1", "1e400", "x", "", [], [5], ["a"], [None], {}, {"5": "x"}, {"type": "x"},
    {"add_generation_prompt": 5, "tools": 1, "messages": 2, "self": 3, "continue_final_message": []},
    [{"role": "user", "content": "x", "tool_calls": 5}], [{"role": "user", "content": "x", "tool_calls": [5]}],
]  # fmt: skip


def write(value: Any) -> bytes:
    """JSON, with Raw numbers as they are."""
    if isinstance(value, dict):
        return b"{" + b",".join(write(str(key)) + b":" + write(item) for key, item in value.items()) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(write, value)) + b"]"
    return str(value).encode() if isinstance(value, Raw) else json.dumps(value).encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(rng: random.Random, request: dict[str, Any]) -> dict[str, Any]:
    """A few fields, or what lies inside them, replaced, and most others left out: else one would hide the other."""
    kept = {"prompt", "messages", "input", *rng.sample(sorted(request), rng.randint(1, 4))}
    kept |= {needed for name, needed in (("stream_options", "stream"), ("top_logprobs", "logprobs")) if name in kept}
    request = {name: copy.deepcopy(value) for name, value in request.items() if name in kept}
    for _ in range(rng.choice((1, 1, 2, 3))):
        *outer, last = rng.choice(list(places(request)))
        target: Any = request
        for key in outer:
            target = target[key]
            if not isinstance(target, (dict, list)):
                break  # replaced a moment ago
        else:
            alike = [edge for edge in EDGES if type(edge) is type(target[last])]
            target[last] = copy.deepcopy(rng.choice(alike if alike and rng.random() < 0.7 else EDGES))
    return request


def random_json(rng: random.Random, depth: int = 0) -> Any:
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(EDGES)
    if rng.random() < 0.5:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = [*SHARED, "prompt", "messages", "input", "role", "content", "tools", "x"]
    return {rng.choice(names): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def body(rng: random.Random, request: dict[str, Any]) -> bytes:
    kind = rng.random()
    if kind < 0.7:
        return write(mutated(rng, request))
    if kind < 0.8:
        return write(random_json(rng))
    text = write(mutated(rng, request))
    if kind < 0.85:  # duplicate keys
        return text[:-1] + b"," + write(mutated(rng, request))[1:]
    if kind < 0.9:  # another encoding, or a byte order mark
        return text.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")))
    if kind < 0.95:  # cut off, or a byte changed
        at = rng.randrange(len(text))
        return text[:at] if rng.random() < 0.5 else text[:at] + rng.randbytes(1) + text[at + 1 :]
    return rng.randbytes(rng.randrange(200))


async def test_no_value_of_any_field_is_a_bug(service, lanes, caplog):
    """Each field of each class of requests on its own, so that none hides behind another's refusal."""
    kinds: dict[str, tuple[type[OpenAIRequest], dict[str, Any]]] = {
        "/v1/completions": (CompletionRequest, {"prompt": "Hi", "max_tokens": 2}),
        "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        "/v1/embeddings": (EmbeddingRequest, {"input": "Hi"}),
    }
    bugs, num_taken = [], 0
    transport = httpx.ASGITransport(build_http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, (kind, least) in kinds.items():
            for name in kind.model_fields:
                for value in FIELD_EDGES:
                    response = await client.post(path, content=write(least | {name: value}))
                    num_taken += response.status_code == 200
                    if response.status_code >= 500 and response.status_code != 504:
                        bugs.append(f"{path} {name}={value!r:.100}: {response.text[:300]}")
    assert not bugs, bugs[:3]
    assert num_taken > 300 and not lanes.running
    assert not [record for record in caplog.records if record.exc_info]


async def test_no_http_body_is_a_bug(service, lanes, caplog):
    rng = random.Random(20)
    types = ["application/json"] * 6 + [
        "",
        "text/plain",
        "application/json; charset=utf-16",
        "multipart/form-data",
        "\x7f",
    ]

    async def post(client: httpx.AsyncClient, path: str, content: bytes, type: str) -> None:
        response = await client.post(path, content=content, headers={"content-type": type})
        if response.status_code >= 500:
            bugs.append(f"{path} {content[:300]!r}: {response.text[:300]}")
        elif response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and error["type"] and {"param", "code"} <= error.keys()
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    statuses: dict[int, int] = {}
    bugs: list[str] = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(build_http_app(service)), base_url="http://t") as client:
        for _ in range(NUM_BODIES // AT_ONCE):
            paths = [rng.choice(list(REQUESTS)) for _ in range(AT_ONCE)]
            calls = [post(client, path, body(rng, REQUESTS[path]), rng.choice(types)) for path in paths]
            await asyncio.wait_for(asyncio.gather(*calls), 60)
        assert (await client.post("/v1/completions", json={"prompt": "Hi"})).status_code == 200
    assert not bugs, bugs[:3]
    assert statuses[200] > NUM_BODIES / 40 and statuses[400] > NUM_BODIES / 4, statuses
    assert not lanes.running
    assert not [record for record in caplog.records if record.exc_info]


# ---- gRPC

NUMBERS: dict[int, list[Any]] = {
    Field.CPPTYPE_INT32: [0, 1, -1, 2**31 - 1, -(2**31)],
    Field.CPPTYPE_UINT32: [0, 1, 2**32 - 1],
    Field.CPPTYPE_INT64: [0, 1, -1, 2**63 - 1, -(2**63)],
    Field.CPPTYPE_DOUBLE: [0.0, -0.0, 0.5, -1.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf")],
    Field.CPPTYPE_BOOL: [False, True],
    Field.CPPTYPE_STRING: [
        "", "a", "\x00", "user", "f", "{", "[1", "{}", '{"type":"odd"}', "(", "ﷺ" * 40, "\U0010ffff", "[" * 5000,
    ],
}  # fmt: skip


def fill(rng: random.Random, message: Message, share: float, depth: int = 0) -> None:
    """Edge values in that share of the fields."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() > share or depth > 6:
            continue
        value = getattr(message, field.name)
        if field.cpp_type == Field.CPPTYPE_MESSAGE:
            if hasattr(value, "add"):
                fill(rng, value.add(), 0.5, depth + 1)
            elif isinstance(value, Message):
                value.SetInParent()
                fill(rng, value, share, depth + 1)
            elif field.name == "logit_bias":
                value[rng.choice(NUMBERS[Field.CPPTYPE_INT32])] = rng.choice(NUMBERS[Field.CPPTYPE_DOUBLE])
        elif hasattr(value, "extend"):
            value.extend(rng.choices(NUMBERS[field.cpp_type], k=rng.choice((1, 2, 30))))
        else:
            setattr(message, field.name, rng.choice(NUMBERS[field.cpp_type]))


def serialized(rng: random.Random, kind: type[Message]) -> bytes:
    message = kind()
    if rng.random() < 0.7:  # else nearly all would fail for want of a prompt
        if isinstance(message, pb.GenerateRequest):
            message.text = "Hi"
        elif isinstance(message, pb.ChatRequest):
            message.messages.add(role="user", content="Hi")
    fill(rng, message, rng.choice((0.05, 0.1, 0.3)))
    data = message.SerializeToString()
    chance = rng.random()
    if chance < 0.1:
        return rng.randbytes(rng.randrange(100))
    if chance < 0.2 and data:
        at = rng.randrange(len(data))
        return data[:at] + rng.randbytes(1) + data[at + 1 :]
    return data


async def test_no_grpc_message_is_a_bug(channel, lanes, caplog):
    rng = random.Random(21)
    kinds: dict[str, type[Message]] = {"Generate": pb.GenerateRequest, "Chat": pb.ChatRequest}
    codes: dict[str, int] = {}
    bugs: list[str] = []

    async def call(rpc: str, data: bytes) -> None:
        path = f"/stagemesh.v1.Inference/{rpc}"
        code, details = grpc.StatusCode.OK, ""
        try:
            if rpc.endswith("Stream"):
                async for _ in channel.unary_stream(path)(data):
                    pass
            else:
                await channel.unary_unary(path)(data)
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        # gRPC itself says so where bytes are no message.
        if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL) and "DecodeError" not in details:
            bugs.append(f"{rpc} {data[:300]!r}: {code} {details}")
        codes[code.name] = codes.get(code.name, 0) + 1

    for _ in range(NUM_MESSAGES // AT_ONCE):
        rpcs = [rng.choice(list(kinds)) + rng.choice(("", "Stream")) for _ in range(AT_ONCE)]
        calls = [call(rpc, serialized(rng, kinds[rpc.removesuffix("Stream")])) for rpc in rpcs]
        await asyncio.wait_for(asyncio.gather(*calls), 60)
    assert not bugs, bugs[:3]
    assert codes["OK"] > NUM_MESSAGES / 20 and codes["INVALID_ARGUMENT"] > NUM_MESSAGES / 4, codes
    assert not lanes.running
    assert not [record for record in caplog.records if record.name.startswith("stagemesh")]

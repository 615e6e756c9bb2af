"""Generated bad requests over HTTP and gRPC to the real server, beside healthy streams: refused, never a 5xx."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
from chaos import edges
from chaos.judging import judge_growth, judge_idle, judge_ready, judge_traffic
from chaos.processes import memory_by_process
from chaos.report import Report, spread
from chaos.traffic import Traffic, asks
from support.harness import Cluster

from stagemesh.deployments.proto import inference_pb2 as pb

CLIENTS = 6
TIMEOUT_S = 60.0
MAX_GROWTH_MB = 200.0
COMPLETIONS, CHATS, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
OUR_FAULT = {"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"}
"""gRPC's codes for what HTTP calls 5xx."""
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e400,
    10**40,
    "",
    "x",
    "\ud800",
    "\x00",
    [],
    [[]],
    [None],
    {},
    {"a": {}},
    [[1], "a"],
]
FIELDS = {
    COMPLETIONS: ["model", "prompt", "max_tokens", "stream", "stream_options", "logprobs", "echo", "suffix", "user"],
    CHATS: [
        "messages",
        "tools",
        "tool_choice",
        "response_format",
        "top_logprobs",
        "max_completion_tokens",
        "functions",
    ],
    EMBEDDINGS: ["input", "dimensions", "encoding_format", "model", "user"],
}
"""Fields that edges.EDGES does not have; each gets every value of ODD."""


def run(cluster: Cluster, *, bodies: int = 2_000, calls: int = 2_000, streams: int = 4) -> Report:
    """bodies: over HTTP, beside some hundred that are no JSON at all. calls: over gRPC."""
    report = Report("doors")
    traffic = Traffic(cluster.url, asks(1, 48), streams)
    rng = random.Random(0)
    with traffic, ThreadPoolExecutor(CLIENTS) as pool:
        with httpx.Client(base_url=cluster.url, timeout=TIMEOUT_S) as client:
            # The first batch of each size makes a worker larger, once.
            ends = list(pool.map(lambda job: _post(client, *job), _bodies(rng, bodies // 2)))
            memory = memory_by_process()
            jobs = [*_raw_bodies(rng), *_bodies(rng, bodies)]
            ends += pool.map(lambda job: _post(client, *job), jobs)
        with grpc.insecure_channel(cluster.grpc_address) as channel:
            messages = list(_messages(rng, calls))
            grpc_ends = list(pool.map(lambda message: _call(channel, *message), messages))
    judge_idle(report, cluster)
    judge_ready(report, cluster)
    judge_growth(report, memory, memory_by_process(), MAX_GROWTH_MB)
    judge_traffic(report, traffic)
    _judge_http(report, ends)
    _judge_grpc(report, grpc_ends)
    return report


def _judge_http(report: Report, ends: list[dict[str, Any]]) -> None:
    bad = [end for end in ends if end["status"] >= 500 or end["status"] == 0 or "no error object" in end["said"]]
    report.data["http"] = {
        "bodies": len(ends),
        "statuses": dict(Counter(end["status"] for end in ends)),
        "seconds": spread([end["seconds"] for end in ends]),
        "bad": len(bad),
    }
    shown = [{**end, "body": end["body"][:160]} for end in bad[:8]]
    report.check(bad == [], f"{len(bad)} bad bodies get an answer, never a 5xx, errors as objects", shown)


def _judge_grpc(report: Report, ends: list[dict[str, Any]]) -> None:
    # That the bytes are no message is found by gRPC itself, before us; it calls that UNKNOWN.
    undecodable = [end for end in ends if "DecodeError" in end["said"] or "deserializing" in end["said"]]
    bad = [end for end in ends if end["code"] in OUR_FAULT and end not in undecodable]
    report.data["grpc"] = {
        "calls": len(ends),
        "codes": dict(Counter(end["code"] for end in ends)),
        "undecodable": len(undecodable),
        "seconds": spread([end["seconds"] for end in ends]),
        "bad": len(bad),
    }
    report.check(bad == [], f"{len(bad)} bad messages get an answer, never a server's fault", bad[:8])


def _post(client: httpx.Client, path: str, body: bytes) -> dict[str, Any]:
    started = time.monotonic()
    try:
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        status, said = response.status_code, _said(response)
    except httpx.HTTPError as error:
        status, said = 0, repr(error)
    seconds = time.monotonic() - started
    return {
        "status": status,
        "said": said,
        "seconds": seconds,
        "path": path,
        "body": body[:400].decode(errors="replace"),
    }


def _said(response: httpx.Response) -> str:
    if response.status_code == 200:
        return "answered"
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return f"no error object: {response.text[:200]}"
    return str(message)[:200]


def _raw_bodies(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """What is no JSON, or more of it than anyone needs."""
    whole = json.dumps(_base(CHATS)).encode()
    deep = 100_000
    bodies = [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"1e400",
        b"NaN",
        b"[" * deep,
        b"[" * deep + b"]" * deep,
        b'{"a":' * deep,
        b'{"model": "demo", "messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"model": "demo", "prompt": "x", "prompt": 5}',
        b'{"model": "demo", "prompt": "\xff\xfe"}',
        b'{"model": "demo", "prompt": "\\ud800"}',
        b'{"model": "demo", "prompt": "\\u0000"}',
        b'{"model": "demo", "prompt": ' + b"9" * 100_000 + b"}",
        b'{"model": "demo", "prompt": [' + b"1," * 100_000 + b"1]}",
        b'{"model": "demo", "prompt": "' + b"x" * (1 << 20) + b'"}',
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
        whole + b"}",
        b"\x00" * 1_000,
    ]
    bodies += [whole[: rng.randrange(len(whole))] for _ in range(40)]
    bodies += [_flipped(whole, rng) for _ in range(100)]
    bodies += [rng.randbytes(int(100_000 ** rng.random())) for _ in range(40)]
    for i, body in enumerate(bodies):
        yield (COMPLETIONS, CHATS, EMBEDDINGS)[i % 3] if i > 20 else COMPLETIONS, body


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _base(path: str) -> dict[str, Any]:
    """A good request with a short answer."""
    if path == EMBEDDINGS:
        return {"model": "demo", "input": "The king"}
    if path == COMPLETIONS:
        return {"model": "demo", "prompt": "The king", "max_tokens": 4}
    messages = [{"role": "user", "content": "What is 17+25?"}]
    return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 4}


def _bodies(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Every field's edges singly, then at random in pairs, then shapes of messages and tools."""
    changes: list[tuple[str, dict[str, Any]]] = []
    for path, names in FIELDS.items():
        changes += [(path, {name: value}) for name in names for value in ODD]
    changes += [(rng.choice([COMPLETIONS, CHATS]), change) for change in edges.singles()]
    changes += [(CHATS, change) for change in _shapes(rng)]
    rng.shuffle(changes)
    changes += [(rng.choice([COMPLETIONS, CHATS]), change) for change in edges.pairs(max(0, count - len(changes)))]
    for path, change in changes[:count]:
        yield path, edges.to_json({**_base(path), **change}).encode()


def _shapes(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Of messages and tools."""
    roles = ["user", "assistant", "system", "tool", "function", "", "x" * 1_000, "<|user|>", None]
    contents = ["", "x", None, [], [{"type": "text"}], [{"type": "text", "text": 5}], [{"type": "image_url"}], {}, 5]
    for role in roles:
        yield {"messages": [{"role": role, "content": rng.choice(contents)} for _ in range(rng.randrange(1, 4))]}
        yield {"messages": [{"role": role}, {"content": "x"}]}
        yield {"messages": [{"role": role, "content": "x", "tool_calls": rng.choice([[], [{}], None, "x"])}]}
    nested: dict[str, Any] = {"type": "object"}
    for _ in range(150):
        nested = {"type": "object", "properties": {"a": nested}}
    schemas = [{}, {"type": "nothing"}, {"$ref": "#/no"}, nested, {"pattern": "("}, {"enum": []}, {"minimum": 1e400}]
    for schema in schemas:
        function = {"name": rng.choice(["f", "", "x" * 300, "a b\n"]), "parameters": schema}
        yield {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        yield {"tools": [{"type": "function", "function": function}] * 200}
        form = {"name": "x", "schema": schema}
        yield {"response_format": {"type": "json_schema", "json_schema": form}}


def _call(channel: grpc.Channel, method: str, message: bytes) -> dict[str, Any]:
    """One call with bytes as the message, whole or streamed as the method is."""
    started = time.monotonic()
    path = f"/stagemesh.v1.Inference/{method}"
    try:
        if method.endswith("Stream"):
            for _ in channel.unary_stream(path)(message, timeout=TIMEOUT_S):
                pass
        else:
            channel.unary_unary(path)(message, timeout=TIMEOUT_S)
        code, said = "OK", ""
    except grpc.RpcError as error:
        code, said = error.code().name, str(error.details())[:200]
    return {"method": method, "code": code, "said": said, "seconds": time.monotonic() - started, "bytes": len(message)}


def _messages(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Three of four are messages with wrong contents, the others broken or random bytes."""
    methods = ["Generate", "GenerateStream", "Chat", "ChatStream"]
    changes = edges.singles()
    for i in range(count):
        method = methods[i % 4]
        made = _message(method, rng, rng.sample(changes, 2))
        kind = rng.random()
        if kind > 0.75:
            made = _flipped(made, rng) if kind < 0.9 and made else rng.randbytes(int(20_000 ** rng.random()))
        yield method, made


def _message(method: str, rng: random.Random, changes: list[dict[str, Any]]) -> bytes:
    sampling = pb.Sampling(max_tokens=rng.choice([4, 4, 4, 1, 0, -1, -(2**31)]))
    for change in changes:
        for name, value in change.items():
            _set(sampling, name, value)
    text = rng.choice(["The king", "", "x" * 100_000, "\x00", "é" * 3_000, "<|eos|>"])
    if method.startswith("Generate"):
        request = pb.GenerateRequest(model=rng.choice(["", "demo", "other"]), sampling=sampling)
        if rng.random() < 0.5:
            request.text = text
        else:
            request.token_ids.ids.extend(rng.choice([[], [5], [-1], [2048], [2**31 - 1], [0] * 5_000]))
        return request.SerializeToString()
    chat = pb.ChatRequest(model=rng.choice(["", "demo"]), sampling=sampling)
    for _ in range(rng.randrange(4)):
        chat.messages.append(pb.ChatMessage(role=rng.choice(["user", "", "no"]), content=text[:2_000]))
    if rng.random() < 0.3:
        chat.tools.append(pb.Tool(name=rng.choice(["f", ""]), parameters=rng.choice(["", "{", "[]", '{"type": 5}'])))
        chat.tool_choice = rng.choice(["", "required", "f", "g"])
    if rng.random() < 0.2:
        chat.chat_template_kwargs["messages"] = rng.choice(["x", 5.0, None])
    return chat.SerializeToString()


def _set(sampling: pb.Sampling, name: str, value: Any) -> None:
    """As far as the field's type can hold it."""
    try:
        if name == "logit_bias":
            for token_id, bias in value.items():
                sampling.logit_bias[int(token_id)] = bias
        elif name == "structured_outputs":
            for kind in ("regex", "grammar"):
                if kind in value:
                    setattr(sampling.structured_outputs, kind, value[kind])
            if "json" in value:
                sampling.structured_outputs.json = json.dumps(value["json"])
            if "choice" in value:
                sampling.structured_outputs.choice.texts.extend(value["choice"])
        elif isinstance(value, list):
            getattr(sampling, name).extend(value)
        elif value is not None:
            setattr(sampling, name, value)
    except (ValueError, TypeError, AttributeError, UnicodeError):
        pass  # gRPC's own types refuse it

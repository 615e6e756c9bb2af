"""Thirty requests give one answer each, whichever way they come: HTTP and gRPC, streamed and whole, and `LLM`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format
from support.harness import DEMO, Cluster

from stagemesh import LLM, SamplingParams
from stagemesh.config.sampling import StructuredOutputsParams
from stagemesh.deployments.offline.outputs import CompletionOutput
from stagemesh.deployments.proto import inference_pb2 as pb
from stagemesh.deployments.proto import inference_pb2_grpc
from stagemesh.stages.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>Use <tool_call></tool_call>: {{ tools | tojson }}{{ eos_token }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
SUM = [{"role": "user", "content": "What is 17+25?"}]
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "3+4?"}]},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "What is 12+30?"},
]
CALLED = [
    *SUM,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 5}'}}],
    },
    {"role": "tool", "content": "42"},
]
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 1.0, "seed": 11}
NAMED = {"type": "function", "function": {"name": "add"}}

REQUESTS: dict[str, dict[str, Any]] = {
    # Completions: "prompt". Chats: "messages".
    "greedy": {"prompt": "First Citizen:", "max_tokens": 24, **GREEDY},
    "greedy, token ids": {"prompt": [1, 70, 71, 72, 73], "max_tokens": 12, **GREEDY},
    "one token": {"prompt": "First", "max_tokens": 1, **GREEDY},
    "seeded": {"prompt": "ROMEO:", "max_tokens": 24, **SEEDED},
    "seeded, nucleus": {"prompt": "ROMEO:", "max_tokens": 24, **SEEDED, "top_p": 0.8, "top_k": 40},
    "seeded, min_p": {"prompt": "ROMEO:", "max_tokens": 24, **SEEDED, "min_p": 0.05, "temperature": 1.4},
    "negative seed": {"prompt": "ROMEO:", "max_tokens": 9, "temperature": 1.0, "seed": -3},
    "n=3": {"prompt": "JULIET:", "max_tokens": 16, **SEEDED, "n": 3},
    "n=3, chat": {"messages": [{"role": "user", "content": "Speak, citizen!"}], "max_tokens": 16, **SEEDED, "n": 3},
    "stop strings": {"prompt": "First Citizen:", "max_tokens": 48, **GREEDY, "stop": ["STOP0", "STOP1"]},
    "stop string, shown": {
        "prompt": "First Citizen:",
        "max_tokens": 48,
        **GREEDY,
        "stop": ["STOP1"],
        "include_stop_str_in_output": True,
    },
    "stop string after min_tokens": {
        "prompt": "First Citizen:",
        "max_tokens": 48,
        **GREEDY,
        "stop": ["STOP0"],
        "min_tokens": 30,
    },
    "stop string that is the whole answer": {"prompt": "First Citizen:", "max_tokens": 9, **GREEDY, "stop": ["STOP2"]},
    "stop token": {"prompt": "First Citizen:", "max_tokens": 48, **GREEDY, "stop_token_ids": ["STOP_TOKEN"]},
    "logprobs": {"prompt": "ROMEO:", "max_tokens": 8, **SEEDED, "logprobs": 4},
    "logprobs of a stopped answer": {
        "prompt": "First Citizen:",
        "max_tokens": 48,
        **GREEDY,
        "stop": ["STOP0"],
        "logprobs": 0,
    },
    "logprobs, chat": {"messages": SUM, "max_tokens": 8, **GREEDY, "logprobs": 3},
    "prompt logprobs": {"prompt": "First Citizen:", "max_tokens": 4, **GREEDY, "prompt_logprobs": 2},
    "penalties": {
        "prompt": "First Citizen:",
        "max_tokens": 24,
        **GREEDY,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
    "bias and bad words": {
        "prompt": "First Citizen:",
        "max_tokens": 24,
        **GREEDY,
        "logit_bias": {"300": 4.0},
        "bad_words": ["the", "STOP1"],
    },
    "empty answer": {"prompt": "First Citizen:", "max_tokens": 5, **GREEDY, "allowed_token_ids": ["EOS"]},
    "past the end": {"messages": SUM, "max_tokens": 12, **GREEDY, "ignore_eos": True, "skip_special_tokens": False},
    "characters of several tokens": {
        "prompt": "Sing:",
        "max_tokens": 40,
        **SEEDED,
        "structured_outputs": {"regex": "[🙂äß漢]{6}"},
    },
    "cut inside a character": {
        "prompt": "Sing:",
        "max_tokens": 3,
        **GREEDY,
        "structured_outputs": {"choice": ["🙂🙂"]},
    },
    "JSON schema": {"messages": SUM, "max_tokens": 60, **SEEDED, "structured_outputs": {"json": PARAMETERS}},
    "conversation of parts": {"messages": TURNS, "max_tokens": 8, **GREEDY},
    "conversation with calls": {"messages": CALLED, "max_tokens": 8, **SEEDED},
    "tools, required": {
        "messages": SUM,
        "max_tokens": 90,
        **SEEDED,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
    "tools, named": {"messages": SUM, "max_tokens": 60, **SEEDED, "tools": TOOLS, "tool_choice": NAMED},
    "tools, free": {"messages": SUM, "max_tokens": 12, **GREEDY, "tools": TOOLS, "tool_choice": "auto"},
}


@dataclass
class Answer:
    """One choice, in the shape that all ways can be brought to."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[Any]
    """Per token: (bytes, logprob, [(bytes, logprob) of the likeliest])."""
    prompt_logprobs: list[Any]
    """Per prompt token after the first: {token text: logprob}."""
    calls: list[tuple[str, str]]
    """Name and arguments."""

    @classmethod
    def empty(cls) -> Answer:
        return cls("", [], "", [], [], [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("demo-with-tools")
    for file in DEMO.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder), dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def served(cluster: Cluster, folder: Path) -> Cluster:
    cluster.deploy(model=str(folder))
    return cluster


@pytest.fixture(scope="module")
def stops(llm: LLM) -> dict[str, Any]:
    """Stop strings that span tokens of the greedy answer, and a token of it."""
    params = SamplingParams(temperature=0.0, max_tokens=48)
    (output,) = llm.generate("First Citizen:", params, use_tqdm=False)[0].outputs
    tokenizer = llm.get_tokenizer()
    texts = [tokenizer.decode([token_id]) for token_id in output.token_ids]
    assert "".join(texts) == output.text
    first, second = (texts[i][-1] + texts[i + 1] + texts[i + 2][0] for i in (14, 34))
    eos = sorted(llm.config.model.eos_token_ids)[0]
    return {
        "STOP0": first,
        "STOP1": second,
        "STOP2": (texts[0] + texts[1])[:2],
        "STOP_TOKEN": output.token_ids[20],
        "EOS": eos,
    }


def filled(value: Any, stops: dict[str, Any]) -> Any:
    """`value` with the names of stops replaced by what they stand for."""
    if isinstance(value, dict):
        return {key: filled(item, stops) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, stops) for item in value]
    return stops.get(value, value) if isinstance(value, str) else value


# ---- HTTP


def http_body(request: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": "demo", "return_token_ids": True, **request, **more}
    if "messages" not in request:
        return "/v1/completions", body
    if "logprobs" in body:
        body["logprobs"], body["top_logprobs"] = True, body["logprobs"]
    return "/v1/chat/completions", body


def http_logprobs(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice.get("logprobs")
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            (
                bytes(entry["bytes"]),
                entry["logprob"],
                [(bytes(top["bytes"]), top["logprob"]) for top in entry["top_logprobs"]],
            )
            for entry in logprobs["content"]
        ]
    # The completions' lists name tokens by their text, the chosen one among the likeliest.
    tops = logprobs["top_logprobs"]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True))


def http_calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]


def http_whole(served: Cluster, request: dict[str, Any]) -> list[Answer]:
    path, body = http_body(request)
    response = httpx.post(served.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    whole = response.json()
    answers = []
    for choice in whole["choices"]:
        message = choice.get("message", {})
        text = choice["text"] if "text" in choice else message["content"] or ""
        entries = whole.get("prompt_logprobs") or choice.get("prompt_logprobs") or []
        prompt = [{e["decoded_token"]: e["logprob"] for e in entry.values()} for entry in entries[1:]]
        ids, reason = choice["token_ids"], choice["finish_reason"]
        answers.append(Answer(text, ids, reason, http_logprobs(choice), prompt, http_calls(message)))
    return answers


def http_streamed(served: Cluster, request: dict[str, Any]) -> list[Answer]:
    path, body = http_body(request, stream=True)
    answers = [Answer.empty() for _ in range(request.get("n", 1))]
    with httpx.stream("POST", served.url + path, json=body, timeout=60) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    for chunk in map(json.loads, events):
        (choice,) = chunk["choices"]
        answer = answers[choice["index"]]
        delta = choice.get("delta", {})
        answer.text += choice.get("text") or delta.get("content") or ""
        answer.token_ids += choice.get("token_ids", [])
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
        answer.logprobs += http_logprobs(choice)
        for call in delta.get("tool_calls") or ():
            add_call(answer, call["index"], call["function"].get("name"), call["function"]["arguments"])
    return answers


def add_call(answer: Answer, index: int, name: str | None, arguments: str) -> None:
    if index == len(answer.calls):
        answer.calls.append((name or "", ""))
    answer.calls[index] = (answer.calls[index][0], answer.calls[index][1] + arguments)


# ---- gRPC


def grpc_request(request: dict[str, Any]) -> pb.GenerateRequest | pb.ChatRequest:
    own = {"prompt", "messages", "tools", "tool_choice", "parallel_tool_calls"}
    fields = {name: value for name, value in request.items() if name not in own}
    form = fields.pop("structured_outputs", None)
    bias = {int(key): value for key, value in fields.pop("logit_bias", {}).items()}
    sampling = pb.Sampling(**fields, logit_bias=bias)
    if form is not None:
        if "json" in form:
            form = {"json": json.dumps(form["json"])}
        if "choice" in form:
            form = {"choice": pb.Texts(texts=form["choice"])}
        sampling.structured_outputs.CopyFrom(pb.StructuredOutputs(**form))
    if "prompt" in request:
        if isinstance(request["prompt"], str):
            return pb.GenerateRequest(text=request["prompt"], sampling=sampling)
        return pb.GenerateRequest(token_ids=pb.TokenIds(ids=request["prompt"]), sampling=sampling)
    chat = pb.ChatRequest(sampling=sampling)
    for message in request["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        calls = [
            pb.ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        chat.messages.append(pb.ChatMessage(role=message["role"], content=content or "", tool_calls=calls))
    for tool in request.get("tools", ()):
        function = tool["function"]
        parameters = json.dumps(function["parameters"]) if "parameters" in function else ""
        description = function.get("description", "")
        chat.tools.append(pb.Tool(name=function["name"], description=description, parameters=parameters))
    choice = request.get("tool_choice", "")
    chat.tool_choice = choice if isinstance(choice, str) else choice["function"]["name"]
    if "parallel_tool_calls" in request:
        chat.parallel_tool_calls = request["parallel_tool_calls"]
    return chat


def grpc_logprobs(entries: Any, is_chat: bool) -> list[Any]:
    if is_chat:
        return [(e.text, e.logprob, [(top.text, top.logprob) for top in e.top]) for e in entries]
    return [(text_of(e.text), e.logprob, {text_of(t.text): t.logprob for t in (*e.top, e)}) for e in entries]


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def grpc_prompt_logprobs(entries: Any) -> list[Any]:
    return [{text_of(t.text): t.logprob for t in (entry, *entry.top)} for entry in entries]


def grpc_answers(served: Cluster, request: dict[str, Any], *, stream: bool) -> list[Answer]:
    message = grpc_request(request)
    is_chat = isinstance(message, pb.ChatRequest)
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        metadata = [("application", "stagemesh")]
        if not stream:
            call = stub.Chat if is_chat else stub.Generate
            whole = call(message, metadata=metadata, timeout=60)
            return [
                Answer(
                    choice.message.content if is_chat else choice.text,
                    list(choice.token_ids),
                    choice.finish_reason,
                    grpc_logprobs(choice.logprobs, is_chat),
                    grpc_prompt_logprobs(choice.prompt_logprobs),
                    [(call.name, call.arguments) for call in choice.message.tool_calls] if is_chat else [],
                )
                for choice in whole.choices
            ]
        answers = [Answer.empty() for _ in range(request.get("n", 1))]
        call = stub.ChatStream if is_chat else stub.GenerateStream
        for chunk in call(message, metadata=metadata, timeout=60):
            if chunk.HasField("usage"):
                continue
            answer = answers[chunk.index]
            answer.text += chunk.content if is_chat else chunk.text
            answer.token_ids += chunk.token_ids
            answer.finish_reason = chunk.finish_reason or answer.finish_reason
            answer.logprobs += grpc_logprobs(chunk.logprobs, is_chat)
            for tool_call in chunk.tool_calls if is_chat else ():
                add_call(answer, tool_call.index, tool_call.name, tool_call.arguments)
    return answers


# ---- LLM


def offline(llm: LLM, request: dict[str, Any]) -> list[Answer]:
    own = {"prompt", "messages", "tools", "tool_choice", "parallel_tool_calls"}
    fields = {name: value for name, value in request.items() if name not in own}
    if "structured_outputs" in fields:
        fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
    fields["logit_bias"] = {int(key): value for key, value in fields.get("logit_bias", {}).items()}
    params = SamplingParams(**fields)
    if "messages" in request:
        more = {name: request[name] for name in ("tools", "tool_choice", "parallel_tool_calls") if name in request}
        (output,) = llm.chat(request["messages"], params, use_tqdm=False, **more)
    else:
        prompt = request["prompt"]
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    entries = (output.prompt_logprobs or [])[1:]
    prompt_logprobs = [{e.decoded_token: e.logprob for e in (entry or {}).values()} for entry in entries]
    return [
        Answer(
            choice.text,
            list(choice.token_ids),
            choice.finish_reason or "",
            offline_logprobs(llm, choice, "messages" in request, request.get("logprobs", 0)),
            prompt_logprobs,
            [(call.name, call.arguments) for call in choice.tool_calls],
        )
        for choice in output.outputs
    ]


def offline_logprobs(llm: LLM, choice: CompletionOutput, is_chat: bool, count: int) -> list[Any]:
    logprobs = []
    for token_id, by_id in zip(choice.token_ids, choice.logprobs or (), strict=False):
        own = by_id[token_id]
        top = sorted(by_id.items(), key=lambda item: item[1].rank or 0)[:count]
        if is_chat:
            token_bytes = Tokenizer.from_folder(llm.config.model_path).token_bytes
            tops = [(token_bytes(top_id), entry.logprob) for top_id, entry in top]
            logprobs.append((token_bytes(token_id), own.logprob, tops))
        else:
            texts = {entry.decoded_token: entry.logprob for entry in (*(entry for _, entry in top), own)}
            logprobs.append((own.decoded_token, own.logprob, texts))
    return logprobs


# ---- the tests


def test_there_are_thirty_requests() -> None:
    assert len(REQUESTS) >= 30


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_gives_one_answer_whichever_way_it_comes(
    served: Cluster, llm: LLM, stops: dict[str, Any], name: str
) -> None:
    request = filled(REQUESTS[name], stops)
    ways = {
        "LLM": offline(llm, request),
        "HTTP": http_whole(served, request),
        "gRPC": grpc_answers(served, request, stream=False),
    }
    if "prompt_logprobs" not in request:  # refused in streams, as by vLLM
        ways["HTTP streamed"] = http_streamed(served, request)
        ways["gRPC streamed"] = grpc_answers(served, request, stream=True)
    expected = ways["HTTP"]
    assert len(expected) == request.get("n", 1)
    for way, answers in ways.items():
        for answer, one in zip(answers, expected, strict=True):
            assert (answer.text, answer.token_ids) == (one.text, one.token_ids), way
            assert (answer.finish_reason, answer.calls) == (one.finish_reason, one.calls), way
            assert flat(answer.logprobs) == pytest.approx(flat(one.logprobs), abs=1e-5), way
            assert flat(answer.prompt_logprobs) == pytest.approx(flat(one.prompt_logprobs), abs=1e-5), way
    check_that_it_tests_something(name, request, expected)


def flat(logprobs: list[Any]) -> dict[str, float]:
    """Every number under its place and the token's text, in an order that all ways share."""
    numbers: dict[str, float] = {}
    for i, entry in enumerate(logprobs):
        if isinstance(entry, dict):
            numbers |= {f"{i} {token!r}": logprob for token, logprob in entry.items()}
            continue
        token, logprob, top = entry
        numbers[f"{i} own {token!r}"] = logprob
        pairs = top.items() if isinstance(top, dict) else top
        numbers |= {f"{i} top {top_token!r}": top_logprob for top_token, top_logprob in pairs}
    return numbers


def check_that_it_tests_something(name: str, request: dict[str, Any], answers: list[Answer]) -> None:
    (first, *others) = answers
    if "stop string" in name:
        assert first.finish_reason == "stop"
    if name == "stop string that is the whole answer":
        assert first.text == "" and first.token_ids
    if name == "empty answer":
        assert first.text == "" and first.finish_reason == "stop"
    if request.get("n"):
        assert len({answer.text for answer in answers}) == len(answers)
    if "logprobs" in request:
        assert len(first.logprobs) == len(first.token_ids)
    if "prompt_logprobs" in request:
        assert len(first.prompt_logprobs) == 3
    if name == "characters of several tokens":
        assert len(first.text) == 6 and len(first.token_ids) > 12
    if name == "cut inside a character":
        assert first.text.endswith("\ufffd") and first.finish_reason == "length"
    if name in ("tools, required", "tools, named"):
        assert len(first.calls) == 1 and not first.text


def test_a_proto_knows_every_field_of_sampling_that_the_requests_use() -> None:
    used = {name for request in REQUESTS.values() for name in request}
    elsewhere = {"prompt", "messages", "tools", "tool_choice", "parallel_tool_calls"}
    known = {field.name for field in pb.Sampling.DESCRIPTOR.fields}
    assert used - elsewhere <= known
    assert json_format.MessageToDict(pb.Sampling(seed=-3)) == {"seed": "-3"}

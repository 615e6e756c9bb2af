"""What clients of vLLM 0.32 count on, as tables: requests to the demo model, run in this process, and what must be true
of the answers. What differs on purpose is in the README's table."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from base64 import b64decode
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from support.harness import DEMO

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.deployments.ingress.app import build_http_app
from stagemesh.deployments.ingress.lanes import LaneClientCounts
from stagemesh.deployments.ingress.service import InferenceService
from stagemesh.deployments.offline.local_lane import LocalLane
from stagemesh.stages.messages.request import EngineRequest, LaneError, LaneStats, TokenDelta
from stagemesh.stages.text.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio

CONTEXT = 512
VOCAB = 2048
Check = Callable[[Any], bool]
TEXT, CHAT, BATCH, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/embeddings"
FIVE = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
COMPLETE = {"prompt": "Once upon a time", **FIVE}
IDS = {"prompt": [9] * 5, **FIVE}
TALK = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "What is 17+25?"}]
ASK = {"messages": TALK, **FIVE}
BEGUN = {"messages": [TALK[1], {"role": "assistant", "content": "The sum "}], **FIVE}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
}
TOOL = {"type": "function", "function": {"name": "hire", "parameters": PERSON}}
HIRE = {"type": "function", "function": {"name": "hire"}}


class InProcessLanes:
    """One lane, without Ray. A LaneClient and a TokenSink."""

    def __init__(self) -> None:
        args = EngineArgs(model=str(DEMO), device="cpu", dtype="float32", max_model_len=CONTEXT, max_num_seqs=32)
        self._readers: dict[str, Callable[[TokenDelta | BaseException], None]] = {}
        self.lane = LocalLane(EngineConfig.resolve(args), self, on_failure=print)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[TokenDelta | BaseException]()
        read = self._readers[request.request_id] = lambda item: loop.call_soon_threadsafe(inbox.put_nowait, item)
        done = self.lane.generate(msgspec.structs.replace(request, reply_to="router"))
        done.add_done_callback(lambda done: read(error) if (error := done.exception()) else None)
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._readers[request.request_id]
            self.lane.abort(request.request_id)

    def emit(self, reply_to: str, deltas: list[TokenDelta]) -> bool:
        for delta in deltas:
            if (read := self._readers.get(delta.request_id)) is not None:
                read(delta)
        return True

    def publish(self, stats: LaneStats) -> None:
        pass

    def gone_readers(self, reply_to: Iterable[str]) -> set[str]:
        return set()

    def lane_stats(self) -> list[LaneStats]:
        return [self.lane.engine.stats().result()]

    def ready(self) -> bool:
        return True

    def counts(self) -> LaneClientCounts:
        return LaneClientCounts()


@pytest.fixture(scope="module")
def engine() -> Iterator[InProcessLanes]:
    lanes = InProcessLanes()
    lanes.lane.start()
    yield lanes
    lanes.lane.close()


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def client_of(lanes: Any, tokenizer: Tokenizer, **settings: Any) -> httpx.AsyncClient:
    size = {"max_model_len": CONTEXT, "vocab_size": VOCAB, "embedding_size": 256, "model_root": "some/demo"}
    service = InferenceService(lanes=lanes, tokenizer=tokenizer, model_names=["demo", "other"], **size | settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(build_http_app(service)), base_url="http://test")


@pytest.fixture
async def http(engine: InProcessLanes, demo_tokenizer: Tokenizer) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with client_of(engine, demo_tokenizer) as client:
        yield client


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    response = await http.post(path, json={"model": "demo", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def stream(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    response = await http.post(path, json={"model": "demo", "stream": True, **body})
    assert response.status_code == 200, response.text
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


def row(name: str, *values: Any) -> Any:
    return pytest.param(*values, id=name)


# ---- what is refused, and what the message says

DEEP = json.loads('{"type": "array", "items": ' * 200 + "{}" + "}" * 200)
HALF_SCHEMA = {"type": "object", "properties": {"brand": {"$ref": "#/$defs/No"}, "foo": "bar"}}
LONG = 1 << 63


def structured(**form: Any) -> dict[str, Any]:
    return {"structured_outputs": form}


BOTH = [  # of completions and chats alike
    ("a schema that is none", structured(json=HALF_SCHEMA), "structured_outputs"),
    ("a pattern that is none", structured(regex="[.*"), "structured_outputs"),
    ("a pattern that is no text", structured(regex={"1": "Python"}), "structured_outputs"),
    ("a grammar that is none", structured(grammar='root ::= nosuchrule\ncolumn = "a "'), "structured_outputs"),
    ("an empty grammar", structured(grammar=""), "structured_outputs"),
    ("a tag that is none", structured(structural_tag="not json"), "structural_tag"),
    ("an empty tag", structured(structural_tag=""), "structural_tag"),
    ("a tag format of null", {"response_format": {"type": "structural_tag", "format": None}}, "structural_tag"),
    ("an empty tag format", {"response_format": {"type": "structural_tag", "format": {}}}, "structural_tag"),
    ("a form without its schema", {"response_format": {"type": "json_schema"}}, "json_schema.*must be provided"),
    ("too deep a schema", {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, "recursion"),
    ("stream options without a stream", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("stream options of null", {"stream_options": {"include_usage": None}}, "stream_options"),
    ("usage steps without a stream", {"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ("usage steps of null", {"stream_options": {"continuous_usage_stats": None}}, "stream_options"),
    ("prompt_logprobs below 0", {"prompt_logprobs": -1}, "prompt_logprobs"),
    ("prompt_logprobs as text", {"prompt_logprobs": "2"}, "prompt_logprobs.*must be an integer"),
    ("a seed below int64", {"seed": -LONG - 1}, "greater_than_equal"),
    ("a seed above int64", {"seed": LONG}, "less_than_equal"),
    ("bias of an unknown id", {"logit_bias": {str(VOCAB + 1): 1}}, f"{VOCAB + 1}.*{VOCAB}"),
    ("bias of words", {"logit_bias": {"bad1": 50, "bad2": 20}}, "logit_bias.*bad1.*bad2"),
    ("bias that is no number", {"logit_bias": {"1": "much"}}, "logit_bias"),
    ("far too many answers", {"n": 100_000_000}, "n=100000000"),
    ("ids to report by beam search", {"logprobs": 1, "logprob_token_ids": [5], "use_beam_search": True}, "beam search"),
    ("an empty salt", {"cache_salt": ""}, "cache_salt"),
]
REFUSED = [row(f"{path[4:]}: {name}", path, body | more, words) for name, more, words in BOTH for path, body in
           ((TEXT, COMPLETE), (CHAT, ASK))] + [
    row("too many logprobs", TEXT, IDS | {"logprobs": 21}, "logprobs"),
    row("too many logprobs, streamed", TEXT, IDS | {"logprobs": 30, "stream": True}, "logprobs"),
    row("logprobs below -1", TEXT, IDS | {"logprobs": -2}, "logprobs"),
    row("logprobs as text", TEXT, IDS | {"logprobs": "2"}, "logprobs.*must be an integer"),
    row("too many top_logprobs", CHAT, ASK | {"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
    row("too many, streamed", CHAT, ASK | {"logprobs": True, "top_logprobs": 21, "stream": True}, "top_logprobs"),
    row("top_logprobs as text", CHAT, ASK | {"logprobs": True, "top_logprobs": "2"}, "must be an integer"),
    row("no prompt", TEXT, FIVE | {"prompt": None, "prompt_embeds": []}, "prompt"),
    row("an id beyond the vocabulary", TEXT, FIVE | {"prompt": [999999]}, "out of vocabulary"),
    row("a negative id", TEXT, FIVE | {"prompt": [-1]}, "prompt"),
    row("a negative id in a list", TEXT, FIVE | {"prompt": [[-1]]}, "prompt"),
    row("ids to report of no answer", TEXT,
        COMPLETE | {"echo": True, "max_tokens": 0, "logprobs": 5, "logprob_token_ids": [50]}, "logprob_token_ids"),
    row("echo of beams", TEXT, COMPLETE | {"echo": True, "logprobs": 1, "use_beam_search": True}, "beam search"),
    row("more prompts than it takes", TEXT, FIVE | {"prompt": ["a"] * 1025}, "prompt"),
    row("more lists than it takes", TEXT, FIVE | {"prompt": [[5]] * 1025}, "prompt"),
    row("a suffix", TEXT, COMPLETE | {"suffix": "end"}, "suffix"),
    row("an unknown effort", CHAT, ASK | {"reasoning_effort": "extra_high"}, "reasoning_effort"),
    row("a tool to use and none there", CHAT, ASK | {"tool_choice": HIRE}, "tool"),
    row("a tool that is not there", CHAT, ASK | {"tools": [TOOL], "tool_choice": {
        "type": "function", "function": {"name": "fire"}}}, "fire"),
    row("an empty tool choice", CHAT, ASK | {"tools": [TOOL], "tool_choice": {}}, "tool_choice"),
    row("a batch with a wrong tag", BATCH, ASK | {"messages": [TALK], "response_format": {
        "type": "structural_tag", "format": {}}}, "structural_tag"),
    row("a negative id to embed", EMBED, {"input": [-1]}, "out of vocabulary"),
    row("more to keep than fits", EMBED, {"input": "Hi", "truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt"),
    row("two ends of a chat", EMBED, {"messages": TALK, "continue_final_message": True, "add_generation_prompt": True},
        "Cannot set both `continue_final_message` and `add_generation_prompt` to True."),
    *(row(f"{name} that is none", EMBED, {"input": "Hi", "encoding_format": "base64", name: f"bad_{name}"},
          f"(?=.*literal_error).*bad_{name}") for name in ("encoding_format", "embed_dtype", "endianness")),
    row("padding to the longest", EMBED, {"input": "Hi", "padding": "longest"}, "padding"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "words"), REFUSED)
async def test_a_request_that_is_refused_and_says_why(http, path, body, words):
    response = await http.post(path, json={"model": "demo", **body})
    assert response.status_code == 400, response.text
    assert re.search(words, response.json()["error"]["message"]), response.text
    assert (await ask(http, TEXT, IDS))["choices"], "and the server goes on"


@pytest.mark.parametrize("body", ['"this is text{{{"', '["a", "list"]', "42", "null", "{no json"])
async def test_a_body_that_is_no_object(http, body):
    for path in (TEXT, CHAT, BATCH, EMBED):
        response = await http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text


async def test_a_form_is_no_body(http):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert 400 <= (await http.post(CHAT, content=json.dumps(ASK), headers=headers)).status_code < 500


# ---- whole answers


def usage(answer: Any, **counts: int) -> bool:
    used = answer["usage"]
    total = used["prompt_tokens"] + used["completion_tokens"]
    return used["total_tokens"] == total and all(used[name] == count for name, count in counts.items())


def text_of(answer: Any) -> Any:
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def reports(answer: Any) -> Any:
    """Of each token: its text and the texts beside it."""
    logprobs = answer["choices"][0]["logprobs"]
    if "content" in logprobs:
        return [(entry["token"], [top["token"] for top in entry["top_logprobs"]]) for entry in logprobs["content"]]
    return list(zip(logprobs["tokens"], [top and list(top) for top in logprobs["top_logprobs"]], strict=True))


def named(*ids: int) -> set[str]:
    return {f"token_id:{id}" for id in ids}


def named_ids(given: list[int], sampled: int, top: int | None) -> dict[str, Any]:
    own = {"max_tokens": 1, "logprob_token_ids": given, "allowed_token_ids": [sampled], "return_tokens_as_token_ids": 1}
    return own | ({"logprobs": top} if top is not None else {})


ANSWERS: list[Any] = [
    row("a text", TEXT, COMPLETE, lambda a: len(a["choices"]) == 1 and len(text_of(a)) >= 5 and bool(a["id"])
        and a["choices"][0]["finish_reason"] == "length" and usage(a, completion_tokens=5)),
    row("token ids", TEXT, IDS, lambda a: usage(a, prompt_tokens=5, completion_tokens=5)
        and a["choices"][0]["prompt_logprobs"] is None and a["choices"][0]["logprobs"] is None),
    row("prompts beyond the cache", TEXT, IDS, lambda a: a["usage"]["prompt_tokens_details"]["cached_tokens"] == 0),
    row("keep the first ids", TEXT, FIVE | {"prompt": list(range(3, 11)), "truncate_prompt_tokens": 4,
        "truncation_side": "right", "return_token_ids": True},
        lambda a: a["choices"][0]["prompt_token_ids"] == [3, 4, 5, 6]),
    row("keep the last ids", TEXT, FIVE | {"prompt": list(range(3, 11)), "truncate_prompt_tokens": 4,
        "truncation_side": "left", "return_token_ids": True},
        lambda a: a["choices"][0]["prompt_token_ids"] == [7, 8, 9, 10]),
    row("no other token", TEXT, IDS | {"logprobs": 0}, lambda a: [len(top) for _, top in reports(a)] == [1] * 5),
    row("five others", TEXT, IDS | {"logprobs": 5}, lambda a: all(5 <= len(top) <= 6 for _, top in reports(a))),
    row("ids to report", TEXT, COMPLETE | named_ids([500], 42, 5),
        lambda a: [(token, set(top)) for token, top in reports(a)] == [("token_id:42", named(42, 500))]),
    *(row(f"ids to report in a chat, {sampled} sampled of {given}", CHAT,
          ASK | named_ids(given, sampled, None) | {"logprobs": True, "top_logprobs": top},
          lambda a, given=given, sampled=sampled: [(token, set(tops), len(tops)) for token, tops in reports(a)]
          == [(f"token_id:{sampled}", named(*given, sampled), len({*given, sampled}))])
      for given, top, sampled in (([500], 5, 42), ([100, 300, 500], 3, 42), ([100, 300, 500], 3, 500))),
    row("ids to report in a batch", BATCH, ASK | named_ids([100, 300], 42, None) | {
        "messages": [TALK], "logprobs": True, "top_logprobs": 5},
        lambda a: set(reports(a)[0][1]) == named(100, 300, 42)),
    row("logprobs of prompts", TEXT, FIVE | {"prompt": ["A robot", "My name"], "prompt_logprobs": 0},
        lambda a: all(len(choice["prompt_logprobs"]) > 0 for choice in a["choices"])),
    row("three answers", TEXT, COMPLETE | {"n": 3, "temperature": 1.5, "seed": 42, "logprobs": 0, "max_tokens": 20},
        lambda a: [choice["index"] for choice in a["choices"]] == [0, 1, 2]
        and len({choice["text"] for choice in a["choices"]}) == 3),
    row("two prompts", TEXT, COMPLETE | {"prompt": ["Once upon"] * 2},
        lambda a: len(a["choices"]) == 2 and a["choices"][0]["text"] == a["choices"][1]["text"]),
    row("two lists of ids", TEXT, IDS | {"prompt": [[9] * 5] * 2},
        lambda a: len(a["choices"]) == 2 and a["choices"][0]["text"] == a["choices"][1]["text"]),
    *(row(f"{what} before its answer, {count} others", TEXT, FIVE | {"prompt": prompt, "echo": True, "logprobs": count},
          lambda a, prompt=prompt, count=count: (isinstance(prompt, list) or text_of(a).startswith(prompt))
          and len(reports(a)) > 5 and reports(a)[0][1] is None and len(a["choices"][0]["logprobs"]["text_offset"]) > 5
          and a["choices"][0]["logprobs"]["token_logprobs"][0] is None
          and all(max(count, 1) <= len(top) <= count + 1 for _, top in reports(a)[1:]))
      for what, prompt in (("a text", "Hello, my name is Ann"), ("ids", [9] * 5)) for count in (0, 1)),
    row("an echo as ids", TEXT, COMPLETE | {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True},
        lambda a: all(next(iter(top)) == token for token, top in reports(a)[1:])),
    row("echo, ids and logprobs agree", TEXT, COMPLETE | {"echo": True, "logprobs": 1, "return_token_ids": True,
        "return_tokens_as_token_ids": True, "prompt_logprobs": 1},
        lambda a: [int(token[9:]) for token, _ in reports(a)]
        == a["choices"][0]["prompt_token_ids"] + a["choices"][0]["token_ids"]),
    row("keys of ids not asked for", TEXT, COMPLETE | {"return_token_ids": False, "logprobs": 1},
        lambda a: a["choices"][0]["token_ids"] is a["choices"][0]["prompt_token_ids"] is None),
    row("a choice of texts", TEXT, COMPLETE | structured(choice=["Python", "Rust"]) | {"ignore_eos": False},
        lambda a: text_of(a) in ("Python", "Rust")),
    row("no logprobs", CHAT, ASK | {"logprobs": False}, lambda a: a["choices"][0]["logprobs"] is None),
    row("no other token in a chat", CHAT, ASK | {"logprobs": True, "top_logprobs": 0},
        lambda a: [len(top) for _, top in reports(a)] == [0] * 5),
    row("null others", CHAT, ASK | {"logprobs": True, "top_logprobs": None},
        lambda a: [len(top) for _, top in reports(a)] == [0] * 5),
    row("null others in a batch", BATCH, ASK | {"messages": [TALK], "logprobs": True, "top_logprobs": None},
        lambda a: [len(top) for _, top in reports(a)] == [0] * 5),
    row("five others in a chat", CHAT, ASK | {"logprobs": True, "top_logprobs": 5}, lambda a: len(reports(a)[0][1]) == 5
        and all(top["logprob"] <= 0 for top in a["choices"][0]["logprobs"]["content"][0]["top_logprobs"])),
    row("no logprobs of a chat's prompt", CHAT, ASK, lambda a: a["prompt_logprobs"] is None),
    *(row(f"{count} logprobs of a chat's prompt", CHAT, ASK | {"prompt_logprobs": count},
          lambda a, count=count: max(count, 1) <= len(a["prompt_logprobs"][3]) <= count + 1) for count in (0, 1, 2)),
    row("a chat", CHAT, ASK | {"logprobs": True, "top_logprobs": 5}, lambda a: len(a["choices"]) == 1 and bool(a["id"])
        and a["choices"][0]["finish_reason"] == "length" and usage(a, completion_tokens=5)
        and a["choices"][0]["message"]["role"] == "assistant"),
    row("a choice in a chat", CHAT, ASK | {"structured_outputs": {"choice": ["Python", "Rust"]}, "ignore_eos": False},
        lambda a: text_of(a) in ("Python", "Rust")),
    row("a schema in a chat", CHAT, ASK | {"structured_outputs": {"json": PERSON}, "max_tokens": 200,
        "ignore_eos": False}, lambda a: jsonschema.validate(json.loads(text_of(a)), PERSON) is None),
    row("a pattern in a chat", CHAT, ASK | {"structured_outputs": {"regex": r"(25[0-5]|1\d\d)(\.\d\d){3}"},
        "max_tokens": 30, "ignore_eos": False}, lambda a: text_of(a).count(".") == 3 and len(text_of(a)) == 12),
    row("logprobs under a grammar", CHAT, ASK | {"structured_outputs": {"choice": ["Python", "Rust"]}, "logprobs": True,
        "top_logprobs": 5, "ignore_eos": False}, lambda a: all(top["logprob"] >= -9999 for top in
        a["choices"][0]["logprobs"]["content"][0]["top_logprobs"])),
    row("any object", CHAT, ASK | {"response_format": {"type": "json_object"}, "max_tokens": 300, "ignore_eos": False},
        lambda a: a["choices"][0]["finish_reason"] == "length" or isinstance(json.loads(text_of(a)), dict)),
    row("a response's schema", CHAT, ASK | {"max_tokens": 200, "ignore_eos": False, "response_format": {
        "type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
        lambda a: jsonschema.validate(json.loads(text_of(a)), PERSON) is None),
    row("a plain response", CHAT, ASK | {"response_format": {"type": "text"}}, lambda a: text_of(a) is not None),
    row("a field that no message has", CHAT, ASK | {"messages": [TALK[1] | {"extra_field": "0"}]},
        lambda a: text_of(a) is not None),
    row("a message in parts", CHAT, {"temperature": 0, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is 17+25?"}]}]}, lambda a: text_of(a) == "42"),
    row("three answers in a chat", CHAT, ASK | {"n": 3, "temperature": 1.5, "seed": 42, "max_tokens": 20},
        lambda a: [choice["index"] for choice in a["choices"]] == [0, 1, 2]
        and len({choice["message"]["content"] for choice in a["choices"]}) > 1),
    row("one answer", CHAT, ASK | {"n": 1}, lambda a: len(a["choices"]) == 1 and a["choices"][0]["index"] == 0),
    row("any effort that there is", CHAT, ASK | {"reasoning_effort": "max"}, lambda a: text_of(a) is not None),
    row("bias of the last id", CHAT, ASK | {"logit_bias": {str(VOCAB - 1): 1.0}}, lambda a: text_of(a) is not None),
    row("bias that decides", TEXT, IDS | {"logit_bias": {"77": 100}, "return_token_ids": True},
        lambda a: a["choices"][0]["token_ids"] == [77] * 5),
    row("words to avoid", TEXT, COMPLETE | {"bad_words": ["the", "a"]}, lambda a: len(text_of(a)) > 0),
    row("a stop id", TEXT, IDS | {"logit_bias": {"77": 100}, "stop_token_ids": [77, 77], "ignore_eos": False},
        lambda a: (a["choices"][0]["finish_reason"], a["choices"][0]["stop_reason"]) == ("stop", 77)),
    row("echo of a begun answer", CHAT, BEGUN | {"echo": True, "continue_final_message": True,
        "add_generation_prompt": False}, lambda a: text_of(a).startswith("The sum ")),
    row("a begun answer", CHAT, BEGUN | {"continue_final_message": True, "add_generation_prompt": False},
        lambda a: "The sum " not in text_of(a)),
    row("echo of a user", BATCH, ASK | {"messages": [TALK], "echo": True}, lambda a: "17" not in text_of(a)),
    row("echo in a batch", BATCH, BEGUN | {"messages": [BEGUN["messages"]], "echo": True,
        "continue_final_message": True, "add_generation_prompt": False},
        lambda a: text_of(a).startswith("The sum ")),
    row("a batch", BATCH, ASK | {"messages": [TALK, TALK]}, lambda a: [c["index"] for c in a["choices"]] == [0, 1]
        and all(choice["message"]["content"] for choice in a["choices"])),
    row("a batch with a schema", BATCH, ASK | {"messages": [TALK, TALK], "max_tokens": 200, "ignore_eos": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        lambda a: all({"name", "age"} == json.loads(c["message"]["content"]).keys() for c in a["choices"])),
    row("texts beside ids in a batch", BATCH, ASK | {"messages": [TALK], "logprobs": True, "top_logprobs": 1,
        "return_token_ids": True}, lambda a: not any(t.startswith("token_id:") for t, _ in reports(a))),
    row("ids as texts in a batch", BATCH, ASK | {"messages": [TALK], "logprobs": True, "top_logprobs": 1,
        "return_tokens_as_token_ids": True}, lambda a: all(token.startswith("token_id:") for token, _ in reports(a))),
    row("a named tool", CHAT, ASK | {"tools": [TOOL], "tool_choice": HIRE, "max_tokens": 200, "ignore_eos": False},
        lambda a: text_of(a) == "" and jsonschema.validate(json.loads(
            a["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]), PERSON) is None),
    row("any tool", CHAT, ASK | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 300, "ignore_eos": False},
        lambda a: a["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "hire"),
    *(row(f"a tool cut off, {name}", CHAT, ASK | {"tools": [TOOL], "tool_choice": choice, "max_tokens": 1},
          lambda a: a["choices"][0]["finish_reason"] == "length" and not a["choices"][0]["message"].get("tool_calls"))
      for name, choice in (("required", "required"), ("named", HIRE))),
    *(row(f"a call with arguments {arguments!r} and its result", CHAT, ASK | {"messages": [
        *TALK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "hire", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"}]}, lambda a: text_of(a) is not None)
      for arguments in ("{}", "")),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "is_right"), ANSWERS)
async def test_a_whole_answer(http, path, body, is_right: Check):
    answer = await ask(http, path, body)
    assert is_right(answer), answer


async def test_roles_of_ones_own_take_text_and_parts_alike(http):
    def talk(content: Any) -> dict[str, Any]:
        return ASK | {"messages": [{"role": "my-own", "content": content}]}

    plain, parts = [await ask(http, CHAT, talk(c)) for c in ("Hi", [{"type": "text", "text": "Hi"}])]
    assert text_of(plain) == text_of(parts)


async def test_one_route_for_all(http):
    for path, body in ((CHAT, ASK), (TEXT, COMPLETE), (EMBED, {"input": "Hi"})):
        direct, routed = await ask(http, path, body), await ask(http, "/invocations", body)
        assert direct.keys() == routed.keys()
        if "choices" in direct:
            assert text_of(direct) == text_of(routed)


async def test_ids_are_those_of_the_texts(http, demo_tokenizer):
    answer = await ask(http, CHAT, {"messages": TALK, "temperature": 0, "return_token_ids": True})
    prompt = demo_tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)
    assert "What is 17+25?" in prompt and prompt.endswith("<|assistant|>")
    written = demo_tokenizer.decode(answer["choices"][0]["token_ids"], skip_special_tokens=False)
    assert written == text_of(answer) + "<|eos|>"
    chunks = await stream(http, CHAT, {"messages": TALK, "temperature": 0, "return_token_ids": True})
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    ids = [id for chunk in chunks for choice in chunk["choices"] for id in choice.get("token_ids") or ()]
    assert ids == answer["choices"][0]["token_ids"]


# ---- streams


def finishes(chunks: list[Any]) -> list[str]:
    return [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"] is not None]


def streamed_text(chunks: list[Any], index: int = 0) -> str:
    pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in pieces)


@pytest.mark.parametrize(("path", "body"), [(TEXT, COMPLETE), (CHAT, ASK), (CHAT, ASK | {"max_tokens": 20})])
async def test_a_stream_is_the_whole_answer_in_pieces(http, path, body):
    whole, chunks = await ask(http, path, body), await stream(http, path, body)
    assert streamed_text(chunks) == text_of(whole)
    assert finishes(chunks) == [whole["choices"][0]["finish_reason"]]
    last = chunks[-1]["choices"][0]
    assert last["finish_reason"] == "length" and (last["text"] if "text" in last else last["delta"]["content"])
    roles = [c["delta"]["role"] for chunk in chunks for c in chunk["choices"] if "role" in c.get("delta", ())]
    assert roles == (["assistant"] if path == CHAT else [])


@pytest.mark.parametrize(("path", "body"), [(TEXT, COMPLETE), (CHAT, ASK)])
async def test_several_answers_share_a_stream(http, path, body):
    chunks = await stream(http, path, body | {"n": 3, "temperature": 1.5, "seed": 42, "max_tokens": 20})
    assert finishes(chunks) == ["length"] * 3
    assert len({streamed_text(chunks, index) for index in range(3)}) == 3
    assert all(sum(c["choices"][0]["index"] == i for c in chunks) <= 21 for i in range(3))


async def test_several_prompts_share_a_stream(http):
    chunks = await stream(http, TEXT, COMPLETE | {"prompt": ["Once upon"] * 2})
    assert streamed_text(chunks, 0) == streamed_text(chunks, 1) != ""
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), [(TEXT, COMPLETE), (CHAT, ASK)])
@pytest.mark.parametrize("each", [None, False, True])
@pytest.mark.parametrize("at_end", [None, False, True])
async def test_usage_comes_where_it_is_asked_for(http, path, body, at_end, each):
    asked = {"include_usage": at_end, "continuous_usage_stats": each}
    options = {name: value for name, value in asked.items() if value is not None}
    chunks = await stream(http, path, body | {"stream_options": options})
    counts = [chunk.get("usage") for chunk in chunks]
    if not at_end:
        assert counts == [None] * len(chunks)
        return
    *before, end = chunks
    assert end["choices"] == [] and all(chunk["choices"] for chunk in before)
    assert end["usage"]["completion_tokens"] == 5 and end["usage"]["prompt_tokens"] > 0
    assert all((count is not None) == bool(each) for count in counts[:-1])
    given = [count for count in counts if count is not None]
    assert all(c["total_tokens"] == c["prompt_tokens"] + c["completion_tokens"] for c in given)
    if each:
        steps = [count["completion_tokens"] for count in counts[:-1]]
        assert steps == sorted(set(steps)) and steps[-1] == 5


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_a_long_prompt_streams_usage_and_logprobs(http, path):
    long = "What is 17+25? " * 40
    body = {"prompt": long, "logprobs": 5} if path == TEXT else {"logprobs": True, "top_logprobs": 5}
    messages = {} if path == TEXT else {"messages": [TALK[0], {"role": "user", "content": long}]}
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = await stream(http, path, FIVE | {"logit_bias": {"77": 100}} | body | messages | options)
    seen = empty = 0
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        if choice["logprobs"] is None:
            empty += 1
            assert choice["delta"]["content"] == "" and chunk["usage"]["completion_tokens"] == 0
            continue
        assert choice["text"] if path == TEXT else choice["delta"]["content"]
        seen += len(reports(chunk))
        assert chunk["usage"]["completion_tokens"] == seen
    assert seen == 5 and empty == (path == CHAT)


async def test_streamed_ids_and_logprobs_agree(http):
    own = {"logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    chunks = await stream(http, TEXT, COMPLETE | own)
    reported = [int(token[9:]) for chunk in chunks for token, _ in reports(chunk)]
    assert reported == [id for chunk in chunks for id in chunk["choices"][0]["token_ids"]]
    assert [bool(chunk["choices"][0]["prompt_token_ids"]) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


@pytest.mark.parametrize(("path", "body"), [(TEXT, COMPLETE | {"logprobs": 5}), (CHAT, ASK | {"logprobs": True})])
async def test_ids_to_report_are_streamed(http, path, body):
    own = named_ids([500], 42, body["logprobs"])
    chunks = await stream(http, path, body | own)
    tops = [set(top) for c in chunks if c["choices"] and c["choices"][0]["logprobs"] for _, top in reports(c)]
    assert tops == [named(42, 500)]


async def test_offsets_are_those_of_the_whole_answer_though_a_stop_holds_text_back(http):
    body = {"prompt": "Once upon", **FIVE, "max_tokens": 12, "logprobs": 0, "stop": ["\n\n"]}
    whole = (await ask(http, TEXT, body))["choices"][0]["logprobs"]["text_offset"]
    parts = [c["choices"][0]["logprobs"] for c in await stream(http, TEXT, body)]
    assert [offset for part in parts if part for offset in part["text_offset"]] == whole


async def test_a_named_tool_is_streamed_without_content(http):
    body = ASK | {"tools": [TOOL], "tool_choice": HIRE, "max_tokens": 200, "ignore_eos": False}
    chunks = await stream(http, CHAT, body)
    assert streamed_text(chunks) == "" and len(finishes(chunks)) == 1
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or ()]
    jsonschema.validate(json.loads("".join(call["function"]["arguments"] for call in deltas)), PERSON)


# ---- tokens, models, state


@pytest.mark.parametrize("special", [False, True])
async def test_tokens_of_a_prompt(http, demo_tokenizer, special):
    ids = demo_tokenizer.encode("This is a prompt. xyz1", add_special_tokens=special)
    answer = await ask(http, "/tokenize", {"prompt": "This is a prompt. xyz1", "add_special_tokens": special})
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": CONTEXT, "token_strs": None}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("opens", "goes_on"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("tools", [None, [TOOL]])
async def test_tokens_of_a_chat(http, demo_tokenizer, special, opens, goes_on, tools):
    messages = [TALK[1], {"role": "assistant", "content": "Nice"}, TALK[1]]
    messages += [{"role": "assistant", "content": "Sure,"}] if goes_on else []
    own = {"add_generation_prompt": opens, "continue_final_message": goes_on, "add_special_tokens": special}
    answer = await ask(http, "/tokenize", {"messages": messages, **own} | ({"tools": tools} if tools else {}))
    text = demo_tokenizer.decode(answer["tokens"], skip_special_tokens=False)
    assert demo_tokenizer.encode(text.removeprefix("<|bos|>" * special), add_special_tokens=special) == answer["tokens"]
    assert text.endswith("Sure," if goes_on else "<|assistant|>" if opens else "<|eos|>")
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == CONTEXT
    if not tools:  # the template knows none: they are described in a text of ours
        assert text.startswith("<|bos|>" * (1 + special) + "<|user|>What is 17+25?<|eos|>")


async def test_tokens_have_strings_and_go_back(http, demo_tokenizer):
    answer = await ask(http, "/tokenize", {"prompt": "A test prompt", "return_token_strs": True})
    assert answer["token_strs"] == [demo_tokenizer.token(id) for id in answer["tokens"]]
    ids = demo_tokenizer.encode("A test prompt", add_special_tokens=False)
    assert await ask(http, "/detokenize", {"tokens": ids}) == {"prompt": "A test prompt"}


async def test_models_version_and_health(http):
    first, *others = (await http.get("/v1/models")).json()["data"]
    assert (first["id"], first["root"], [other["id"] for other in others]) == ("demo", "some/demo", ["other"])
    assert (await http.get("/version")).json()["version"]
    assert (await http.get("/health")).status_code == 200


async def test_load_counts_what_runs(http):
    async def load() -> int:
        return (await http.get("/load")).json()["server_load"]

    assert await load() == 0
    running = asyncio.create_task(ask(http, TEXT, IDS | {"max_tokens": 500}))
    while not (seen := await load()) and not running.done():
        await asyncio.sleep(0.001)
    await running
    assert seen == 1 and await load() == 0


# ---- vectors


async def test_vectors(http, demo_tokenizer):
    ids = demo_tokenizer.encode("A test prompt", add_special_tokens=True)
    inputs: list[Any] = ["A test prompt", ids, ["A test prompt"] * 10, [ids] * 10]
    answers = [await ask(http, EMBED, {"input": one, "encoding_format": "float"}) for one in inputs]
    vectors = [entry["embedding"] for answer in answers for entry in answer["data"]]
    assert [len(answer["data"]) for answer in answers] == [1, 1, 10, 10]
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [len(ids) * n for n in (1, 1, 10, 10)]
    assert all(answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] for answer in answers)
    assert all(vector == pytest.approx(vectors[0], abs=1e-4) for vector in vectors) and len(vectors[0]) == 256
    for order in ("native", "little", "big"):
        body = {"input": ids, "encoding_format": "base64", "embed_dtype": "float32", "endianness": order}
        packed = b64decode((await ask(http, EMBED, body))["data"][0]["embedding"])
        assert struct.unpack((">" if order == "big" else "<") + "256f", packed) == pytest.approx(vectors[0], abs=1e-4)


async def test_vectors_of_one_length_unless_told_otherwise(http):
    async def length(**own: Any) -> float:
        vector = (await ask(http, EMBED, {"input": "Hi", **own}))["data"][0]["embedding"]
        return sum(number * number for number in vector) ** 0.5

    assert await length() == pytest.approx(1) == await length(use_activation=True)
    assert abs(await length(use_activation=False) - 1) > 0.01


async def test_vectors_of_what_is_kept_and_of_chats(http, demo_tokenizer):
    for own in ({"input": ["many words here " * 5]}, {"input": list(range(3, 40))}):
        assert (await ask(http, EMBED, own | {"truncate_prompt_tokens": 10}))["usage"]["prompt_tokens"] == 10
    chats = [{}, {"add_generation_prompt": True}, {"continue_final_message": True}, {"add_special_tokens": True}]
    counts = [(await ask(http, EMBED, {"messages": TALK} | own))["usage"]["prompt_tokens"] for own in chats]
    assert counts[3] == counts[0] + 1 and counts[1] > counts[0] > counts[2]


# ---- answers that are scripted


@pytest.mark.parametrize(("path", "body"), [(TEXT, COMPLETE), (CHAT, ASK)])
@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("with_usage", [False, True])
async def test_an_error_inside_reaches_the_client(lanes, tokenizer, path, body, with_token, with_usage):
    lanes.error, lanes.resume = LaneError("internal", "internal server error"), asyncio.Event()
    lanes.resume.set()
    lanes.deltas = [TokenDelta("", 0, [60])] if with_token else []
    async with client_of(lanes, tokenizer, max_model_len=400, vocab_size=300) as http:
        assert (await http.post(path, json=body)).status_code == 500
        response = await http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": with_usage}})
        assert "internal server error" in response.text.lower()
        if response.status_code == 200:
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            assert response.status_code == 500 and not with_token


CALL = '<tool_call>\n{"name": "hire", "arguments": {"name": "Ann", "age": 30}}\n</tool_call>'


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("is_shown", [None, True, False])
async def test_reasoning_and_calls(lanes, tokenizer, thinks, is_shown):
    settings = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes", "max_model_len": 800, "vocab_size": 300}
    own = {"messages": [TALK[1]], "tools": [TOOL], "include_reasoning": is_shown}
    for script in ("The answer.", CALL):
        lanes.answer = "<think>\nHm.\n</think>\n\n" * thinks + script
        body = own | {"chat_template_kwargs": {"enable_thinking": thinks}}
        async with client_of(lanes, tokenizer, **settings) as http:
            answer, chunks = await ask(http, CHAT, body), await stream(http, CHAT, body)
        message = answer["choices"][0]["message"]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        shown = "Hm." if thinks and is_shown is not False else None
        assert message["reasoning"] == shown
        assert "".join(delta.get("reasoning") or "" for delta in deltas).strip() == (shown or "")
        assert (answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0) == thinks
        calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
        if script == CALL:
            assert message["tool_calls"][0]["function"]["name"] == calls[0]["function"]["name"] == "hire"
        else:
            assert message["content"].strip() == streamed_text(chunks).strip() == script and not calls


async def test_a_server_without_a_limit_reports_the_whole_vocabulary(engine, demo_tokenizer):
    async with client_of(engine, demo_tokenizer, max_logprobs=VOCAB) as http:
        assert len((await ask(http, CHAT, ASK | {"max_tokens": 1, "prompt_logprobs": -1}))["prompt_logprobs"]) > 0
        answer = await ask(http, CHAT, ASK | {"max_tokens": 1, "top_logprobs": -1, "logprobs": "true"})
        assert len(reports(answer)[0][1]) == VOCAB
        assert len(reports(await ask(http, TEXT, IDS | {"max_tokens": 1, "logprobs": -1}))[0][1]) > 1000

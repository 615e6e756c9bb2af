"""Mixed streams in closed loop against an OpenAI base URL, each answer compared with the undisturbed one.

The streams run in a thread with an event loop of its own, so that what is done beside them may block.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Self

import httpx
from chaos.report import spread

TIMEOUT_S = 120.0
"""For one request, pauses included."""
LOGPROB_TOLERANCE = 1e-3
"""The batch that a token is computed in changes the last digits."""
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["river", "amber", "crown"]}, "page": {"enum": [1, 2, 3]}},
            "required": ["word", "page"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["king", "queen", "fool"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Ask:
    kind: str
    path: str
    body: dict[str, Any]

    @property
    def has_seed(self) -> bool:
        return self.body.get("temperature", 0) == 0 or "seed" in self.body


@dataclass
class Answer:
    """What came, whole or put together from events. Choices by index."""

    texts: list[str] = field(default_factory=list)
    """Content, tool calls and finish reason of each choice, as one comparable text."""
    logprobs: list[list[float]] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    fingerprint: str | None = None
    error: str = ""
    """"" for a whole answer with status 200."""


@dataclass
class Result:
    ask: Ask
    streamed: bool
    answer: Answer
    started_s: float
    duration_s: float
    pause_s: float
    """The longest time between two events, or until the first; 0 if not streamed."""
    is_right: bool | None = None
    """None: not compared yet, or failed."""


def asks(variants: int, max_tokens: int = 96) -> list[Ask]:
    """Of every kind, `variants` prompts."""
    made: list[Ask] = []
    for i in range(variants):
        prompt = f"Act {i + 1}. Enter the king and"
        long = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        greedy = {**long, "temperature": 0}
        sampled = {**long, "temperature": 1.0, "top_p": 0.95}
        chat = {"model": "demo", "messages": [{"role": "user", "content": f"Tell me of scene {i}."}]}
        completions, chats = "/v1/completions", "/v1/chat/completions"
        penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
        made += [
            Ask("greedy", completions, greedy),
            Ask("seeded", completions, {**sampled, "seed": 40 + i, **penalties}),
            Ask("unseeded", completions, sampled),
            Ask("unseeded chat", chats, {**chat, "temperature": 1.0, "n": 2, "max_tokens": max_tokens}),
            Ask("structured", chats, {**chat, "temperature": 1.0, "seed": i, "max_tokens": 80, **_form()}),
            Ask("tools", chats, {**chat, "temperature": 1.0, "seed": i, "max_tokens": 80, **_tools()}),
            Ask("n=4", completions, {**sampled, "n": 4, "seed": 9 + i, "max_tokens": max_tokens // 2}),
            Ask("logprobs", completions, {**greedy, "logprobs": 3}),
            Ask("chat", chats, {**chat, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}),
        ]
    return made


def _form() -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}


def _tools() -> dict[str, Any]:
    return {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}


class Traffic:
    """`with Traffic(...) as traffic:` streams run meanwhile; at the end each finishes its last request.

    Making one computes the undisturbed answers, so the server must be well then.
    """

    def __init__(self, url: str, kinds: list[Ask], streams: int, seed: int = 0) -> None:
        self.results: list[Result] = []
        self.events: list[float] = []
        """time.monotonic() of every piece of an answer."""
        self._url = url
        self._asks = kinds
        self._streams = streams
        self._seed = seed
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="traffic")
        self._expected = asyncio.run(self._undisturbed([ask for ask in kinds if ask.has_seed]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def compare(self) -> None:
        """Ask for what unseeded answers reported as their seeds, and compare. The server must be well."""
        pending = [result for result in self.results if not result.ask.has_seed and not result.answer.error]
        asyncio.run(self._recompute(pending))

    def summary(self) -> dict[str, Any]:
        failed = [result for result in self.results if result.answer.error]
        wrong = [result for result in self.results if result.is_right is False]
        return {
            "requests": len(self.results),
            "failed": len(failed),
            "wrong": len(wrong),
            "by_kind": dict(Counter(result.ask.kind for result in self.results)),
            "failures": dict(Counter(f"{r.ask.kind}: {r.answer.error[:160]}" for r in failed).most_common(8)),
            "wrong_kinds": dict(Counter(f"{r.ask.kind} streamed={r.streamed}" for r in wrong)),
            "wrong_texts": [self._difference(result) for result in wrong[:3]],
            "pause_s": spread([r.pause_s for r in self.results if r.streamed and not r.answer.error]),
            "duration_s": spread([r.duration_s for r in self.results if not r.answer.error]),
            "fingerprints": sorted({str(r.answer.fingerprint) for r in self.results if not r.answer.error}),
        }

    def _difference(self, result: Result) -> dict[str, Any]:
        expected = self._expected.get(_key(result.ask), Answer())
        return {"kind": result.ask.kind, "expected": expected.texts, "got": result.answer.texts}

    async def _undisturbed(self, wanted: list[Ask]) -> dict[str, Answer]:
        async with _client(self._url) as client:
            gate = asyncio.Semaphore(8)

            async def one(ask: Ask) -> Answer:
                async with gate:
                    return (await request(client, ask, streamed=False, events=[])).answer

            answers = await asyncio.gather(*(one(ask) for ask in wanted))
        broken = {ask.kind: answer.error for ask, answer in zip(wanted, answers, strict=True) if answer.error}
        if broken:
            raise RuntimeError(f"undisturbed requests failed: {broken}")
        return {_key(ask): answer for ask, answer in zip(wanted, answers, strict=True)}

    async def _run(self) -> None:
        async with _client(self._url) as client:
            await asyncio.gather(*(self._stream(client, i) for i in range(self._streams)))

    async def _stream(self, client: httpx.AsyncClient, i: int) -> None:
        """Stream i: every kind in turn, each stream from another place; streamed and not."""
        rng = random.Random(f"{self._seed} {i}")
        turn = i
        while not self._ending.is_set():
            ask = self._asks[turn % len(self._asks)]
            result = await request(client, ask, streamed=rng.random() < 0.6, events=self.events)
            if ask.has_seed and not result.answer.error:
                result.is_right = same(result.answer, self._expected[_key(ask)])
            self.results.append(result)
            turn += 1
            if result.answer.error:
                await asyncio.sleep(0.2)  # a server that refuses at once is not asked all the time

    async def _recompute(self, results: list[Result]) -> None:
        broken: list[str] = []
        async with _client(self._url) as client:
            gate = asyncio.Semaphore(8)

            async def one(result: Result) -> None:
                answer = result.answer
                if not answer.seeds or None in answer.seeds:
                    answer.error = "the answer reports no seed"
                    return
                again = Answer()
                for seed in answer.seeds:
                    body = {**result.ask.body, "seed": seed, "n": 1}
                    async with gate:
                        if broken:
                            answer.error = f"asking again with its seed: {broken[0]}"
                            return
                        whole = await request(client, replace(result.ask, body=body), streamed=False, events=[])
                    if whole.answer.error:
                        broken.append(whole.answer.error)  # the others need not wait for their timeouts
                    again.texts += whole.answer.texts
                    again.logprobs += whole.answer.logprobs
                result.is_right = same(answer, again)

            await asyncio.gather(*(one(result) for result in results))


def same(answer: Answer, expected: Answer) -> bool:
    """Equal texts, and log-probabilities but for rounding."""
    return (
        answer.texts == expected.texts
        and [len(values) for values in answer.logprobs] == [len(values) for values in expected.logprobs]
        and all(
            abs(a - b) < LOGPROB_TOLERANCE
            for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
    )


async def request(client: httpx.AsyncClient, ask: Ask, *, streamed: bool, events: list[float]) -> Result:
    """Never raises for what the server or the connection does."""
    started = time.monotonic()
    pauses = [0.0]
    try:
        if streamed:
            answer = await _streamed(client, ask, events, pauses)
        else:
            response = await client.post(ask.path, json=ask.body)
            answer = _whole(response)
            events.append(time.monotonic())
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:  # also of odd answers
        answer = Answer(error=f"{type(error).__name__}: {error}")
    return Result(ask, streamed, answer, started, time.monotonic() - started, max(pauses))


async def _streamed(client: httpx.AsyncClient, ask: Ask, events: list[float], pauses: list[float]) -> Answer:
    parts: dict[int, _Parts] = {}
    fingerprint: str | None = None
    last = time.monotonic()
    done = False
    async with client.stream("POST", ask.path, json={**ask.body, "stream": True}) as response:
        if response.status_code != 200:
            return Answer(error=f"{response.status_code} {(await response.aread()).decode(errors='replace')[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue  # also a comment: the server lives, but the text pauses
            now = time.monotonic()
            pauses.append(now - last)
            last = now
            events.append(now)
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return Answer(error=f"error event: {json.dumps(chunk['error'])[:300]}")
            fingerprint = chunk.get("system_fingerprint", fingerprint)
            for choice in chunk["choices"]:
                parts.setdefault(choice["index"], _Parts()).add(choice, choice.get("delta"))
    if not done:
        return Answer(error="the stream ended without [DONE]")
    return _answer(parts, fingerprint)


def _whole(response: httpx.Response) -> Answer:
    if response.status_code != 200:
        return Answer(error=f"{response.status_code} {response.text[:300]}")
    body = response.json()
    parts: dict[int, _Parts] = {}
    for choice in body["choices"]:
        parts.setdefault(choice["index"], _Parts()).add(choice, choice.get("message"))
    return _answer(parts, body.get("system_fingerprint"))


def _answer(parts: dict[int, _Parts], fingerprint: str | None) -> Answer:
    choices = [parts[index] for index in sorted(parts)]
    if not choices or any(choice.finish_reason is None for choice in choices):
        return Answer(error="a choice has no finish_reason")
    return Answer(
        [choice.text() for choice in choices],
        [choice.logprobs for choice in choices],
        [choice.seed for choice in choices],
        fingerprint,
    )


@dataclass
class _Parts:
    """Of one choice."""

    content: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    """[name, arguments] by index."""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    seed: int | None = None

    def add(self, choice: dict[str, Any], message: dict[str, Any] | None) -> None:
        """message: of a chat, whole or what is new of it; None for a completion."""
        self.content += choice.get("text") or (message or {}).get("content") or ""
        for place, call in enumerate((message or {}).get("tool_calls") or ()):
            known = self.calls.setdefault(call.get("index", place), ["", ""])
            known[0] += call["function"].get("name") or ""
            known[1] += call["function"].get("arguments") or ""
        logprobs = choice.get("logprobs") or {}
        self.logprobs += logprobs.get("token_logprobs") or []
        self.logprobs += [token["logprob"] for token in logprobs.get("content") or ()]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.seed = choice.get("seed", self.seed)

    def text(self) -> str:
        calls = [self.calls[index] for index in sorted(self.calls)]
        return json.dumps([self.content, calls, self.finish_reason], ensure_ascii=False)


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(TIMEOUT_S, connect=30), limits=limits)


def _key(ask: Ask) -> str:
    return json.dumps([ask.path, ask.body], sort_keys=True)

"""A closed loop of streaming clients: each of `concurrency` sends its next request when its last one ended."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Measured:
    """What the clients saw. Times in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    """Per request: time per output token after the first."""
    num_tokens: int = 0
    elapsed_s: float = 0.0
    errors: int = 0

    def row(self) -> dict[str, float]:
        return {
            "tok_s": self.num_tokens / self.elapsed_s,
            "ttft_p50_ms": 1000 * quantile(self.ttft_s, 0.5),
            "ttft_p99_ms": 1000 * quantile(self.ttft_s, 0.99),
            "tpot_p50_ms": 1000 * quantile(self.tpot_s, 0.5),
            "tpot_p99_ms": 1000 * quantile(self.tpot_s, 0.99),
        }


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


async def closed_loop(
    url: str,
    model: str,
    *,
    concurrency: int,
    num_requests: int,
    prompt_tokens: int,
    max_tokens: int,
    seed: int = 0,
) -> Measured:
    """Run `num_requests` greedy completions of random token prompts (no shared prefix) to their full length."""
    measured = Measured()
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 900) for _ in range(prompt_tokens)] for _ in range(num_requests)]
    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            while prompts:
                await _one(session, url, model, prompts.pop(), max_tokens, measured)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    measured.elapsed_s = time.perf_counter() - started
    return measured


async def _one(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], max_tokens: int, into: Measured
) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            into.errors += 1
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if chunk.get("choices"):
                first = first or now
                last = now
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    if num_tokens < max_tokens:
        into.errors += 1
        return
    into.num_tokens += num_tokens
    into.ttft_s.append(first - started)
    into.tpot_s.append((last - first) / (num_tokens - 1))


def median(values: list[float]) -> float:
    return statistics.median(values)

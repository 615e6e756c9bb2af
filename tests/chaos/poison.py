"""Requests that a lane cannot answer, beside healthy streams: only they may suffer.

Two checkpoints are made from the demo: one with a NaN row in its embedding, one whose tokenizer knows tokens past the
vocabulary. A fault in one row needs the output layer apart from the embedding, else every sequence would meet it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
from chaos import edges
from chaos.judging import judge_idle, judge_traffic
from chaos.report import Report, spread
from chaos.traffic import Traffic, asks
from support.harness import DEMO, Cluster

NAN_TOKEN = 2047
"""Of the demo's rarest; nothing healthy holds it."""
BEYOND = "<|beyond|>"
BEYOND_TOKEN = 2050
"""The vocabulary has 2048."""
ANSWERED_WITHIN_S = 10.0
READY_WINDOW_S = 5.0
"""While `/ready` says 200, healthy streams get something at least this often."""


def make_nan_model(folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    target = _copied(folder / "nan")
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    save_file(weights, target / "model.safetensors")
    _change(target / "config.json", lambda config: config.update(tie_word_embeddings=False))
    return target


def make_large_tokenizer_model(folder: Path) -> Path:
    target = _copied(folder / "tokenizer")

    def add(tokenizer: dict[str, Any]) -> None:
        last = tokenizer["added_tokens"][-1]
        for token_id in range(2048, BEYOND_TOKEN + 1):
            name = BEYOND if token_id == BEYOND_TOKEN else f"<|spare {token_id}|>"
            tokenizer["added_tokens"].append({**last, "id": token_id, "content": name})

    _change(target / "tokenizer.json", add)
    return target


MODELS: dict[str, Callable[[Path], Path]] = {"nan": make_nan_model, "tokenizer": make_large_tokenizer_model}


def model(name: str, folder: Path) -> Path:
    """The checkpoint of that name in MODELS, made in `folder` where it is not there yet."""
    made = folder / name
    return made if made.exists() else MODELS[name](folder)


def run(cluster: Cluster, *, singles: bool = True, num_pairs: int = 300, streams: int = 8) -> Report:
    """The model must be the one with a NaN row; then every edge of every parameter, singly and in pairs."""
    poisons = [_nan_body(i) for i in range(12)]
    rng = random.Random(1)
    changes = edges.singles() if singles else rng.sample(edges.singles(), 20)
    bodies = [_edge_body(change) for change in changes + edges.pairs(num_pairs)]
    return _attack(cluster, "poison", poisons, bodies, streams)


def run_tokenizer(cluster: Cluster, *, num_requests: int = 60, streams: int = 8) -> Report:
    """The model must be the one with too large a tokenizer."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"The king {BEYOND} and"},
        {"prompt": [5, BEYOND_TOKEN, 6]},
        {"prompt": "The king", "allowed_token_ids": [2048, 2049]},
        {"prompt": "The king", "bad_words": [BEYOND]},
        {"prompt": "The king", "logit_bias": {str(BEYOND_TOKEN): 100.0}},
        {"prompt": "The king", "stop_token_ids": [BEYOND_TOKEN]},
    ]
    poisons = [
        {**bodies[i % len(bodies)], "model": "demo", "max_tokens": 8, "stream": i % 4 == 3} for i in range(num_requests)
    ]
    without_answer = [body for body in poisons if body["prompt"] != "The king"]
    others = [body for body in poisons if body["prompt"] == "The king"]
    return _attack(cluster, "poison-tokenizer", without_answer, others, streams)


def _attack(
    cluster: Cluster, part: str, must_fail: list[dict[str, Any]], bodies: list[dict[str, Any]], streams: int
) -> Report:
    """must_fail: no answer to these can be right. The others may get one, or a 4xx, or a named error."""
    report = Report(part)
    traffic = Traffic(cluster.url, asks(1, 64), streams)
    with traffic, _ready_polled(cluster) as polls, ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda body: _ask(cluster, body), must_fail + bodies))
        time.sleep(1)
    answered = [str(body)[-80:] for body, end in zip(must_fail, ends, strict=False) if end["ok"]]
    report.check(answered == [], f"prompts that cannot be computed get no answer ({len(answered)} did)", answered[:3])
    _judge_ends(report, must_fail + bodies, ends)
    judge_idle(report, cluster)
    judge_traffic(report, traffic)
    lies = _lies(polls, traffic.events)
    report.data |= {
        "poisoned": len(ends),
        "ends": dict(Counter(end["said"] if end["ok"] else str(end["status"]) for end in ends)),
        "named_errors": dict(Counter(end["said"][:80] for end in ends if not end["ok"]).most_common(12)),
        "seconds": spread([end["seconds"] for end in ends]),
        "ready": {"polls": len(polls), "true": sum(ready for _, ready in polls), "lies": len(lies)},
    }
    report.check(len(polls) > 0 and any(ready for _, ready in polls), "/ready was polled and said 200")
    report.check(lies == [], "/ready says 200 only while healthy requests are answered", lies[:3])
    return report


def _judge_ends(report: Report, bodies: list[dict[str, Any]], ends: list[dict[str, Any]]) -> None:
    bad, slow = [], []
    for body, end in zip(bodies, ends, strict=True):
        shown = {key: str(value)[:60] for key, value in body.items() if key not in ("model", "prompt", "max_tokens")}
        if end["status"] == 0 or (end["status"] >= 500 and not end["named"]):
            bad.append([shown, end])
        if end["seconds"] > ANSWERED_WITHIN_S:
            slow.append([shown, round(end["seconds"], 1)])
    report.check(bad == [], f"{len(bad)} bad requests end with a 4xx or a named error", bad[:5])
    report.check(slow == [], f"{len(slow)} bad requests end within {ANSWERED_WITHIN_S:g} s", slow[:5])


def _ask(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    """How a request ended: ok, status (0: not at all), what was said, whether as an error object with a message."""
    started = time.monotonic()
    status, text = 0, ""
    try:
        headers = {"content-type": "application/json"}
        content = edges.to_json(body).encode()
        response = httpx.post(f"{cluster.url}/v1/completions", content=content, headers=headers, timeout=30)
        status, text = response.status_code, response.text
    except httpx.HTTPError as error:
        text = repr(error)
    said, named = _error_in(text)
    ok = status == 200 and not named
    return {
        "ok": ok,
        "status": status,
        "said": "answered" if ok else said[:200],
        "named": named,
        "seconds": time.monotonic() - started,
    }


def _error_in(text: str) -> tuple[str, bool]:
    """The message of an error object, of an event too, and whether there is one."""
    for part in [text, *(line[6:] for line in text.splitlines() if line.startswith("data: {"))]:
        try:
            decoded = json.loads(part)
        except ValueError:
            continue
        if isinstance(decoded, dict) and isinstance(decoded.get("error"), dict):
            message = str(decoded["error"].get("message", ""))
            return message, message != ""
    return text[:200], False


def _nan_body(i: int) -> dict[str, Any]:
    prompt = [5 + i, NAN_TOKEN, 6] if i % 2 else [*range(10, 10 + 40 * (i + 1)), NAN_TOKEN]
    more: list[dict[str, Any]] = [{}, {"n": 3}, {"temperature": 0}, {"logprobs": 5}, {"top_p": 0.5}, {"top_k": 3}]
    return {"model": "demo", "prompt": prompt, "max_tokens": 16, "stream": i % 3 == 2, **more[i % 6]}


def _edge_body(change: dict[str, Any]) -> dict[str, Any]:
    return {"model": "demo", "prompt": "The king and the", "max_tokens": 6, **change}


@contextmanager
def _ready_polled(cluster: Cluster) -> Iterator[list[tuple[float, bool]]]:
    """(time.monotonic(), was it ready), twice a second."""
    polls: list[tuple[float, bool]] = []
    ending = Event()

    def poll() -> None:
        while not ending.wait(0.5):
            try:
                ready = httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
            except httpx.HTTPError:
                ready = False
            polls.append((time.monotonic(), ready))

    thread = Thread(target=poll, name="ready")
    thread.start()
    try:
        yield polls
    finally:
        ending.set()
        thread.join()


def _lies(polls: list[tuple[float, bool]], events: list[float]) -> list[float]:
    """When `/ready` said 200 in the middle of a time without any event of healthy streams."""
    if not events:
        return [at for at, ready in polls if ready]
    times = sorted(events)
    gaps = [(a, b) for a, b in zip(times, times[1:], strict=False) if b - a > 2 * READY_WINDOW_S]
    gaps.append((times[-1], float("inf")))
    return [
        round(at - times[0], 1)
        for at, ready in polls
        if ready and any(a + READY_WINDOW_S < at < b - READY_WINDOW_S for a, b in gaps)
    ]


def _copied(target: Path) -> Path:
    shutil.copytree(DEMO, target)
    return target


def _change(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))

"""Values at both ends of each field's range and beyond, singly and in pairs: for bad requests, and for poison."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

HUGE = 2**63
_NUMBERS = [0, -1, 1, 1e-308, 5e-324, -1e-45, 1e-45, 3.4e38, -3.4e38, 3.5e38, 1e308, -1e308, 1e400]
_COUNTS = [0, -1, 1, 2, 2**31 - 1, 2**31, -(2**31), HUGE - 1, HUGE, -HUGE, 2**64, 10**40]

EDGES: dict[str, list[Any]] = {
    "temperature": [*_NUMBERS, 1e-6, 1e-30, 2, 99.99, 100, 100.01, "1", None],
    "top_p": [*_NUMBERS, 0.999999, 1.000001, 1e-9, None],
    "top_k": [*_COUNTS, -2, 2047, 2048, 2049, 0.5, None],
    "min_p": [*_NUMBERS, 0.999999, 1.000001, None],
    "seed": [*_COUNTS, 2**64 - 1, -HUGE - 1, 1.5, None],
    "presence_penalty": [*_NUMBERS, -2, 2, -2.0001, 2.0001, None],
    "frequency_penalty": [*_NUMBERS, -2, 2, -2.0001, 2.0001, None],
    "repetition_penalty": [*_NUMBERS, 1e-6, 0.01, 2, 100, 1e30, None],
    "min_tokens": [0, -1, 1, 4, 5, 2**31, HUGE, 10**40],
    "n": [0, -1, 1, 2, 128, 129, 2**31, 10**40],
    "prompt_logprobs": [0, -1, 1, 20, 21, 2**31, 10**40],
    "logit_bias": [
        {"5": 100},
        {"5": -100},
        {"5": 1e308},
        {"5": -1e400},
        {"2047": 100},
        {"2048": 100},
        {"2049": -1},
        {str(2**31): 1},
        {str(2**63): 1},
        {str(10**30): 1},
        {"-1": 1},
        {str(token): -100 for token in range(2048)},
        {str(token): 100 for token in range(2048)},
        {"x": 1},
        {},
    ],
    "allowed_token_ids": [[], [5], [2047], [2048], [5, 2048], [-1], [2**31], [2**63], [2], [0, 1], [5] * 4000, None],
    "stop_token_ids": [[], [5], [2048], [-1], [2**31], [2**63], [2**64], list(range(2048)), None],
    "stop": ["", [], ["a"] * 16, ["a"] * 17, "x" * 256, "x" * 257, ["\ud800"], "\x00", None],
    "bad_words": [[], [""], ["a"] * 128, ["a"] * 129, ["the " * 500], ["\x00"], [" "], None],
    "ignore_eos": [True, False, None, 1, "yes"],
    "structured_outputs": [
        {"choice": ["a", "b"]},
        {"choice": []},
        {"regex": "("},
        {"regex": "a{1,100000}"},
        {"regex": "(a|aa)+$" * 50},
        {"regex": "[^\\x00-\\U0010ffff]"},
        {"json": {"$ref": "#"}},
        {"json": {"type": "integer", "minimum": 5, "maximum": 4}},
        {"json": {"enum": []}},
        {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
        {"grammar": "root ::= root"},
        {"grammar": "start: start"},
        {"grammar": 'root ::= "' + "a" * 50_000 + '"'},
        {"regex": "a", "choice": ["a"]},
    ],
    "timeout": [0, -1, 1e-9, 1e308, 1e400, 1, None],
    "priority": [0, -1, 1, 2**31, -(2**31), 10**40, 0.5],
}
"""JSON values by field; 1e400 is written as such, which many parsers read as infinity. The demo has 2048 tokens."""


def singles() -> list[dict[str, Any]]:
    return [{name: value} for name, values in EDGES.items() for value in values]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` of all pairs of two fields' values, at random; every pair of fields about equally often."""
    rng = random.Random(seed)
    names = list(itertools.combinations(EDGES, 2))
    rng.shuffle(names)
    chosen = itertools.islice(itertools.cycle(names), count)
    return [{first: rng.choice(EDGES[first]), second: rng.choice(EDGES[second])} for first, second in chosen]


def to_json(value: Any) -> str:
    """JSON in which an infinite float is a number too large for any float. No text here holds the word."""
    return json.dumps(value).replace("Infinity", "1e400")

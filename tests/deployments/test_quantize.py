"""`stagemesh quantize`: the demo model in every format still knows what it knew."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model_harness import Part, ThreadLane
from typer.testing import CliRunner

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.cli import cli
from stagemesh.stages.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "config/models/demo"
SKILLS = ("add", "subtract", "reverse")
QUESTIONS = 40
"""Of each skill; the demo model knows nearly all answers."""
TOKENS = 8
BLOCKS_PER_SEQUENCE = 3


@pytest.fixture(scope="module")
def skills() -> ModuleType:
    spec = importlib.util.spec_from_file_location("skills", DEMO.parent / "skills.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["skills"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(skills: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text: questions from training, answered, as the chat template writes them."""
    chooser = random.Random(11)
    examples = [skills.training_example(chooser.choice(SKILLS), chooser) for _ in range(200)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    tokenizer = Tokenizer.from_folder(DEMO)
    file.write_text("\n\n".join(_render(tokenizer, e.prompt) + e.answer + "<|eos|>" for e in examples))
    return file


@pytest.fixture(scope="module")
def right_answers(skills: ModuleType) -> Callable[..., int]:
    tokenizer = Tokenizer.from_folder(DEMO)
    questions = [example for skill in SKILLS for example in skills.held_out(skill, QUESTIONS, 1)]
    prompts = [tokenizer.encode(_render(tokenizer, q.prompt), add_special_tokens=False) for q in questions]
    wanted = [tokenizer.encode(f"{q.answer}<|eos|>", add_special_tokens=False) for q in questions]

    def count(folder: Path, **args: Any) -> int:
        """Greedy answers that begin with the right tokens, or all of them where they are fewer than TOKENS."""
        lane = ThreadLane(folder, num_blocks=len(prompts) * BLOCKS_PER_SEQUENCE, args={"block_size": 16, **args})
        tables = [list(range(i * BLOCKS_PER_SEQUENCE, (i + 1) * BLOCKS_PER_SEQUENCE)) for i in range(len(prompts))]
        answers = [[t] for t in lane.sample(*[Part(p, 0, b) for p, b in zip(prompts, tables, strict=True)])]
        for step in range(TOKENS - 1):
            parts = [
                Part(answer[-1:], len(prompt) + step, table)
                for prompt, answer, table in zip(prompts, answers, tables, strict=True)
            ]
            for answer, token in zip(answers, lane.sample(*parts), strict=True):
                answer.append(token)
        return sum(a[: len(w)] == w[:TOKENS] for a, w in zip(answers, wanted, strict=True))

    return count


def _render(tokenizer: Tokenizer, prompt: str) -> str:
    return tokenizer.render_chat([{"role": "user", "content": prompt}])


def quantize(*words: str) -> str:
    torch.set_num_threads(1)
    done = CliRunner().invoke(cli, ["quantize", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "to, flags, may_lose",
    [
        ("fp8", [], 0.02),
        ("fp8", ["--scheme", "block"], 0.02),
        ("int8", [], 0.02),
        ("awq", [], 0.05),
        ("gptq", [], 0.05),
        ("gptq", ["--act-order"], 0.05),
    ],
)
def test_the_demo_model_keeps_its_skills_in_every_format(
    right_answers: Callable[..., int], text: Path, tmp_path: Path, to: str, flags: list[str], may_lose: float
) -> None:
    out = tmp_path / "out"
    needs_text = ["--calibration", str(text), "--samples", "4"] if to in ("awq", "gptq") else []
    output = quantize(str(DEMO), "--to", to, "--out", str(out), *needs_text, *flags)

    assert "layer 8 of 8" in output
    assert json.loads((out / "config.json").read_text())["quantization_config"].get("group_size", 128) == 128
    before = right_answers(DEMO, dtype="auto")
    assert before > 0.9 * len(SKILLS) * QUESTIONS
    assert right_answers(out, dtype="auto") >= before - may_lose * len(SKILLS) * QUESTIONS


@pytest.mark.slow
@pytest.mark.parametrize("args", [{"quantization": "fp8"}, {"quantization": "int8"}, {"kv_cache_dtype": "fp8"}])
def test_the_demo_model_keeps_its_skills_when_it_is_quantized_while_loading(
    right_answers: Callable[..., int], args: dict[str, Any]
) -> None:
    lost = right_answers(DEMO, dtype="auto") - right_answers(DEMO, dtype="auto", **args)
    assert lost <= 0.02 * len(SKILLS) * QUESTIONS


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match="calibration=.*nowhere.txt': cannot be read"):
        quantize(str(DEMO), "--to", "awq", "--out", str(tmp_path / "out"), "--calibration", missing)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["quantize", str(DEMO), "--to", "int3", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "int3" in done.output and "gptq" in done.output

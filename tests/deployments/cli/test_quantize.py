"""`stagemesh quantize`: the demo model in every format still knows what it knew."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import DEMO, Cluster, held_out, num_right, skills
from typer.testing import CliRunner

from stagemesh import LLM, SamplingParams
from stagemesh.config.errors import ConfigError
from stagemesh.deployments.cli.main import cli
from stagemesh.stages.text.tokenizer import Tokenizer

QUESTIONS = 50
"""Of each skill; the demo model knows nearly all answers. `make accuracy` asks 200."""
SKILLS = ("add", "lookup")
SHORT_SKILLS = ("add", "subtract", "copy", "reverse")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text: questions from training, answered, as the chat template writes them."""
    chooser = random.Random(11)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    tokenizer = Tokenizer.from_folder(DEMO)
    conversations = [[skills().training_example(chooser.choice(SHORT_SKILLS), chooser)] for _ in range(150)]
    conversations += [skills().lookup_conversation(chooser, 400) for _ in range(20)]
    chooser.shuffle(conversations)
    file.write_text("\n\n".join(_render(tokenizer, turns) for turns in conversations))
    return file


def _render(tokenizer: Tokenizer, turns: list[Any]) -> str:
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
    return tokenizer.render_chat(messages, {"add_generation_prompt": False})


def right_answers(folder: Path, **args: Any) -> int:
    """Of QUESTIONS held-out questions of each of SKILLS, asked of the model in this process."""
    examples = [example for skill in SKILLS for example in held_out(skill, QUESTIONS, seed=5)]
    settings = {"device": "cpu", "max_model_len": 1280, "kv_cache_memory_bytes": "256MiB", "max_num_seqs": 32}
    with LLM(str(folder), **{**settings, **args}) as llm:
        chats = [[{"role": "user", "content": example.prompt}] for example in examples]
        answers = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)
    texts = [answer.outputs[0].text.strip() for answer in answers]
    return sum(text == example.answer for text, example in zip(texts, examples, strict=True))


@pytest.fixture(scope="module")
def before() -> int:
    """Right answers of the model as it is stored."""
    right = right_answers(DEMO)
    assert right >= 0.95 * len(SKILLS) * QUESTIONS
    return right


def quantize(*words: str) -> str:
    torch.set_num_threads(1)
    done = CliRunner().invoke(cli, ["quantize", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


FORMATS = [
    # to, flags, share of the answers that it may cost
    ("fp8", [], 0.02),
    ("fp8", ["--scheme", "block"], 0.02),
    ("int8", [], 0.02),
    ("awq", [], 0.05),
    ("gptq", [], 0.05),
    ("gptq", ["--act-order"], 0.05),
]
WHILE_LOADING = [{"quantization": "fp8"}, {"quantization": "int8"}, {"kv_cache_dtype": "fp8"}]


def quantized(to: str, flags: list[str], text: Path, out: Path) -> Path:
    needs_text = ["--calibration", str(text), "--samples", "4"] if to in ("awq", "gptq") else []
    output = quantize(str(DEMO), "--to", to, "--out", str(out), *needs_text, *flags)
    assert "layer 8 of 8" in output
    assert json.loads((out / "config.json").read_text())["quantization_config"].get("group_size", 128) == 128
    return out


@pytest.mark.slow
@pytest.mark.parametrize("to, flags, may_lose", FORMATS)
def test_the_demo_model_keeps_its_skills_in_every_format(
    before: int, text: Path, tmp_path: Path, to: str, flags: list[str], may_lose: float
) -> None:
    folder = quantized(to, flags, text, tmp_path / "out")
    assert right_answers(folder) >= before - may_lose * len(SKILLS) * QUESTIONS


@pytest.mark.slow
@pytest.mark.parametrize("args", WHILE_LOADING)
def test_the_demo_model_keeps_its_skills_when_it_is_quantized_while_loading(before: int, args: dict[str, Any]) -> None:
    assert right_answers(DEMO, **args) >= before - 0.02 * len(SKILLS) * QUESTIONS


@pytest.fixture(scope="module")
def served_before(cluster: Cluster) -> int:
    return served_right_answers(cluster, model=str(DEMO))


def served_right_answers(cluster: Cluster, **args: Any) -> int:
    cluster.deploy(dtype="bfloat16", pipeline_parallel_size=2, **args)
    return sum(num_right(cluster, skill, 200) for skill in SKILLS)


@pytest.mark.full
@pytest.mark.parametrize("to, flags, may_lose", FORMATS)
def test_the_served_demo_model_keeps_its_skills_in_every_format(
    cluster: Cluster, served_before: int, text: Path, tmp_path: Path, to: str, flags: list[str], may_lose: float
) -> None:
    folder = quantized(to, flags, text, tmp_path / "out")
    right = served_right_answers(cluster, model=str(folder))
    print(f"{to} {' '.join(flags)}: {right} right, as stored {served_before}, of {200 * len(SKILLS)}")
    assert right >= served_before - may_lose * len(SKILLS) * 200


@pytest.mark.full
@pytest.mark.parametrize("args", WHILE_LOADING)
def test_the_served_demo_model_keeps_its_skills_when_it_is_quantized_while_loading(
    cluster: Cluster, served_before: int, args: dict[str, Any]
) -> None:
    right = served_right_answers(cluster, model=str(DEMO), **args)
    print(f"{args}: {right} right, as stored {served_before}, of {200 * len(SKILLS)}")
    assert right >= served_before - 0.02 * len(SKILLS) * 200


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match="calibration=.*nowhere.txt': cannot be read"):
        quantize(str(DEMO), "--to", "awq", "--out", str(tmp_path / "out"), "--calibration", missing)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["quantize", str(DEMO), "--to", "int3", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "int3" in done.output and "gptq" in done.output

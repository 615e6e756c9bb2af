"""The fingerprint: the same for the same answers, another for anything that may change them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from support.harness import DEMO

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.fingerprint import WITHOUT_EFFECT, code_digest, fingerprint
from stagemesh.config.folders import PACKAGE_ROOT


def resolve(folder: Path, **changes: object) -> EngineConfig:
    return EngineConfig.resolve(EngineArgs.parse({"model": str(folder), "device": "cpu", **changes}))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo model under another name."""
    return shutil.copytree(DEMO, tmp_path / "copy")


def test_another_process_with_the_same_files_elsewhere_has_the_same(demo: Path) -> None:
    program = (
        "import sys\n"
        "from stagemesh.config.engine import EngineArgs, EngineConfig\n"
        "from stagemesh.config.fingerprint import fingerprint\n"
        "args = {'model': sys.argv[1], 'device': 'cpu', 'seed': 3, 'step_timeout_s': 7, 'served_model_name': 'x'}\n"
        "print(fingerprint(EngineConfig.resolve(EngineArgs.parse(args))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(demo)], capture_output=True, text=True)
    assert done.stdout.strip() == fingerprint(resolve(DEMO)), done.stderr
    assert len(done.stdout.strip()) == 3 + 12 and done.stdout.startswith("fp_")


def test_names_of_fields_without_effect_exist() -> None:
    assert {field.name for field in fields(EngineConfig)} >= WITHOUT_EFFECT


@pytest.mark.parametrize(
    "change",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"dtype": "float32"},
        {"quantization": "int8"},
        {"block_size": 32},
        {"kv_cache_dtype": "fp8"},
        {"max_model_len": 100},
    ],
)
def test_a_setting_with_effect_changes_it(change: dict[str, object]) -> None:
    assert fingerprint(resolve(DEMO, **change)) != fingerprint(resolve(DEMO))


def test_any_constant_of_the_model_changes_it() -> None:
    config = resolve(DEMO)
    assert fingerprint(replace(config, model=replace(config.model, rms_norm_eps=1e-4))) != fingerprint(config)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip(folder / "model.safetensors", -1),
        lambda folder: flip(folder / "model.safetensors", 100),
        lambda folder: flip(folder / "tokenizer.json", 60_000),
        lambda folder: (folder / "generation_config.json").unlink(),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    ],
)
def test_another_checkpoint_changes_it(demo: Path, change: Callable[[Path], None]) -> None:
    config = resolve(demo)
    before = fingerprint(config)
    change(demo)
    assert fingerprint(config) != before


def test_weights_that_differ_over_a_range_differ_in_the_samples(demo: Path) -> None:
    config = resolve(demo)
    before = fingerprint(config)
    weights = demo / "model.safetensors"
    content = bytearray(weights.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    weights.write_bytes(content)
    assert fingerprint(config) != before


def test_other_code_changes_it(tmp_path: Path) -> None:
    for name in ("config", "stages"):
        shutil.copytree(PACKAGE_ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("models", "__pycache__"))
    before = code_digest(tmp_path)
    (tmp_path / "stages" / "worker" / "sampler.py").rename(tmp_path / "stages" / "worker" / "sampling.py")
    code_digest.cache_clear()
    assert code_digest(tmp_path) != before
    (tmp_path / "stages" / "worker" / "sampling.py").rename(tmp_path / "stages" / "worker" / "sampler.py")
    code_digest.cache_clear()
    assert code_digest(tmp_path) == before

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.model_configs import CONFIGS

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.deployments.cli import main as cli


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["llama-70b"]))
    return str(file)


def run(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit status and output of `stagemesh plan`."""
    monkeypatch.setattr(sys, "argv", ["stagemesh", "plan", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out + err


TWO_MACHINES = ["--gpus", "8xL40S-48GB", "--nodes", "2", "--gpus-per-node", "4", "--intra", "pcie5", "--inter", "25GbE"]


def test_people_read_the_layout_its_reasons_its_bill_and_the_yaml(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = run(model, *TWO_MACHINES, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    for words in (
        "TP=4 × PP=2 on 2 machines with 4xL40S-48GB",
        "70.6 billion parameters",
        "One GPU does not hold the model",
        "GPU KV cache size:",
        "TP all-reduce",
        "80.0 MiB",
        "PP activations",
        "25GbE, 3.125 GB/s",
        "recommended",
        "TP=3: does not divide num_attention_heads=64",
        "tensor_parallel_size: 4",
    ):
        assert words in output


def test_json_holds_everything_and_its_yaml_resolves(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = run(model, *TWO_MACHINES, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    found = json.loads(output)
    assert found["recommended"] == "TP=4 × PP=2"
    best = found["layouts"][0]
    assert best["against"] is None and all(layout["against"] for layout in found["layouts"][1:])
    assert {line["what"] for line in best["bill"]["decode_step"]} >= {"TP all-reduce", "PP activations"}
    assert len(best["stages"]) == 2 and best["stages"][0]["weight_bytes"] > 10e9
    args = yaml.safe_load(found["yaml"])["applications"][0]["args"]
    assert args["model"] == str(tmp_path)
    # The weights are not here, all else is: it is what the engine would run.
    parsed = EngineArgs.parse(args)
    assert (parsed.tensor_parallel_size, parsed.pipeline_parallel_size) == (4, 2)
    assert parsed.max_model_len == 8192


def test_the_yaml_of_a_whole_model_can_be_served(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["config/models/demo", "--gpus", "4xCPU-8GB", "--context", "2048", "--yaml"]
    status, output = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    args = yaml.safe_load(output)["applications"][0]["args"]
    config = EngineConfig.resolve(EngineArgs.parse(args | {"device": "cpu"}))
    assert config.plan.tp_size * config.plan.pp_size * config.data_parallel_size <= 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "1xT4-16GB"], "error: gpus='1 machine with 1xT4-16GB"),
        (["--gpus", "4xFOO"], "error: gpus='FOO': is not in the table"),
        (["--gpus", "4xA100-80GB", "--context", "999999"], "error: context=999999: must be within"),
        (["--gpus", "4xA100-80GB", "--quantization", "compressed-tensors"], "error: quantization='compressed-tensors'"),
    ],
)
def test_a_mistake_is_one_message(
    words: list[str],
    message: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, output = run(model, *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert output.startswith(message)


def test_a_model_that_is_nowhere_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = run("no/such", "--gpus", "1xT4-16GB", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert output.startswith("error: model='no/such': is neither a folder")


def test_a_picture_needs_matplotlib_and_says_so(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "plan.png"
    words = [model, *TWO_MACHINES, "--plot", str(picture)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, output = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert "needs matplotlib: pip install 'stagemesh[plot]'" in output and not picture.exists()


def test_a_picture_is_a_png(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    status, _ = run(model, *TWO_MACHINES, "--plot", str(picture), capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_imports_neither_torch_nor_ray(model: str) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['stagemesh', 'plan', {model!r}, '--gpus', '8xH100-80GB', '--json']\n"
        "from stagemesh.deployments.cli.main import cli\n"
        "try:\n    cli()\nexcept SystemExit as done:\n    assert not done.code\n"
        "assert not {'torch', 'ray'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

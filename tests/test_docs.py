"""The pages of config/docs: their commands run, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PAGES = sorted((REPO / "config" / "docs").glob("*.md"))
COMMANDS = [
    pytest.param(line.partition("#")[0].strip(), id=f"{page.stem}: {line}")
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    for line in block.splitlines()
]
MARKDOWN = [REPO / "README.md", *PAGES]


def test_pages_mark_every_block() -> None:
    for page in PAGES:
        kinds = re.findall(r"^```(\w*)$", page.read_text(), re.M)[::2]
        assert set(kinds) <= {"sh", "gpu"}, page


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str) -> None:
    program, *words = shlex.split(command)
    assert program == "stagemesh"
    done = subprocess.run(
        [sys.executable, "-m", "stagemesh.deployments.cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPO,
    )
    # `doctor` says with 1 that it has found something on the machine that runs the tests.
    assert done.returncode in ((0, 1) if words[0] == "doctor" else (0,)), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"

"""The tree keeps its shape: who imports whom, what is packaged, what may lie at the top."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

REPO = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())

MAY_IMPORT = {
    "config": set[str](),
    "kernels": set[str](),
    "stages": {"config", "kernels"},
    "router": {"config"},
    "deployments": {"config", "kernels", "stages", "router"},
}
MUST_NOT_IMPORT = {
    "config": {"torch", "triton", "ray"},
    "kernels": {"ray"},
    "stages": {"ray", "triton"},
    "router": {"torch", "triton", "ray"},
    "deployments": set[str](),
}
WITHOUT_TORCH = [
    "stagemesh.deployments.cli.main",
    "stagemesh.deployments.ingress.grpc",
    "stagemesh.deployments.lane.leader",
    "stagemesh.deployments.ingress.http",
    "stagemesh.deployments.ingress.router",
    "stagemesh.stages.engine.engine",
    "stagemesh.stages.engine.scheduler",
    "stagemesh.stages.text.tokenizer",
]
"""What the processes that do no tensor work import: torch would cost each of them seconds and memory."""

TOP_LEVEL = {
    *MAY_IMPORT,
    "tests",
    "__init__.py",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
}


def files() -> list[PurePosixPath]:
    """What git tracks or would track, as paths from the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [PurePosixPath(name) for name in listed.stdout.split("\0") if name and (REPO / name).exists()]


def sources(folder: str) -> list[PurePosixPath]:
    return [p for p in files() if p.parts[0] == folder and p.suffix == ".py"]


def imports(path: PurePosixPath) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((REPO / path).read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_from_those_below_it(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [
        f"{path} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if name.startswith("stagemesh.") and name.split(".")[1] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", MUST_NOT_IMPORT)
def test_a_folder_stays_free_of_the_libraries_above_it(folder: str) -> None:
    wrong = [
        f"{path} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if name.split(".")[0] in MUST_NOT_IMPORT[folder]
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "tests"])
def test_modules_are_imported_under_their_one_name(folder: str) -> None:
    wrong = [
        f"{path} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if name.split(".")[0] in MAY_IMPORT
    ]
    assert wrong == []


def test_processes_without_tensors_do_not_import_torch() -> None:
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_top_level_holds_nothing_else() -> None:
    top = {path.parts[0] for path in files()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_no_folder_of_the_top_level_is_a_regular_package() -> None:
    # With an __init__.py, `kernels` in the working directory would hide another package of that name.
    assert [folder for folder in MAY_IMPORT if (REPO / folder / "__init__.py").exists()] == []


def packaged_files() -> list[PurePosixPath]:
    return [path for path in files() if path.parts[0] in MAY_IMPORT]


def test_every_folder_of_modules_is_packaged() -> None:
    folders = {
        str(PurePosixPath("stagemesh", path.parent)).replace("/", ".")
        for path in packaged_files()
        if path.suffix == ".py"
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders | {"stagemesh"}


def test_every_file_that_is_no_module_is_packaged() -> None:
    included = {
        PurePosixPath(path.relative_to(REPO))
        for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in REPO.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    assert [path for path in packaged_files() if path.suffix not in (".py", ".md") and path not in included] == []


def test_every_dependency_has_a_tested_version() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ]", name)[0]).lower()

    pins = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", pin)] == []
    project = PYPROJECT["project"]
    asked = {normal(name) for name in project["dependencies"] + project["optional-dependencies"]["test"]}
    assert asked - {normal(pin) for pin in pins} == set()
    assert "triton" not in {normal(pin) for pin in pins}

"""The tree keeps its shape: who imports whom, how large things are, what is packaged, what may lie at the top."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
ROOMS_MUST_NOT_IMPORT = {
    "stages/text": {"torch"},
    "stages/messages": {"torch"},
    "stages/engine": {"torch"},
    "deployments/offline": {"stagemesh.deployments.ingress", "stagemesh.deployments.openai"},
    "deployments/offline/local_lane.py": {"ray"},
}
WITHOUT_TORCH = ["deployments/ingress", "deployments/lane/leader.py", "deployments/cli/main.py"]
"""Besides the rooms above: what runs in processes that do no tensor work. Torch would cost each of them seconds and
memory, so nothing that they import may import it either."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PRODUCT_LINES = 400, 50, 26_000
FOLDERS_OF_TESTS_ALONE = {"tests/chaos", "tests/training"}

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


def sources(*under: str) -> list[PurePosixPath]:
    """The Python files of folders, or the files themselves."""
    return [p for p in files() if p.suffix == ".py" and any(p.is_relative_to(place) for place in under)]


def product() -> list[PurePosixPath]:
    """What we wrote of the package; generated code aside."""
    return [p for p in sources("__init__.py", *MAY_IMPORT) if not p.stem.endswith(("_pb2", "_pb2_grpc"))]


@cache
def tree(path: PurePosixPath) -> ast.Module:
    return ast.parse((REPO / path).read_text(), str(path))


def imports(path: PurePosixPath) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it: also in functions and for types alone."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [member for member in members if file_of(member) is not None]
            yield from modules
            if len(modules) < len(members):
                yield node.module


def file_of(module: str) -> PurePosixPath | None:
    """The product file of a module's name."""
    package, _, rest = module.partition(".")
    place = PurePosixPath(*rest.split(".")) if rest else PurePosixPath()
    candidates = [place.with_suffix(".py"), place / "__init__.py"] if rest else [place / "__init__.py"]
    return next((p for p in candidates if package == "stagemesh" and (REPO / p).is_file()), None)


def name_of(path: PurePosixPath) -> str:
    """The module's name of a product file."""
    parts = path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts
    return ".".join(["stagemesh", *parts])


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong_imports(place: str, forbidden: set[str]) -> list[str]:
    return [f"{path} imports {name}" for path in sources(place) for name in imports(path) if is_within(name, forbidden)]


def assert_no_circle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


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


@pytest.mark.parametrize("place", [*MUST_NOT_IMPORT, *ROOMS_MUST_NOT_IMPORT])
def test_a_room_stays_free_of_what_lies_above_it(place: str) -> None:
    assert sources(place), f"{place} is gone: say here where it went"
    assert wrong_imports(place, (MUST_NOT_IMPORT | ROOMS_MUST_NOT_IMPORT)[place]) == []


def test_no_module_imports_itself_through_others() -> None:
    assert_no_circle({name_of(path): set(imports(path)) - {name_of(path)} for path in product()})


def test_no_room_imports_itself_through_others() -> None:
    rooms: dict[str, set[str]] = {}
    for path in product():
        imported = {str(file.parent) for name in imports(path) if (file := file_of(name))}
        rooms.setdefault(str(path.parent), set()).update(imported - {str(path.parent)})
    assert_no_circle(rooms)


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
    rooms = [place for place, forbidden in ROOMS_MUST_NOT_IMPORT.items() if "torch" in forbidden]
    modules = [name_of(path) for path in sources(*rooms, *WITHOUT_TORCH)]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_room_says_what_it_is_for() -> None:
    rooms = {path.parent for path in packaged_files() if path.suffix == ".py"}
    assert sorted(str(room) for room in rooms if room / "README.md" not in files()) == []


def test_a_file_of_the_product_is_short_enough_to_read_at_once() -> None:
    lengths = {str(path): len((REPO / path).read_text().splitlines()) for path in product()}
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}
    assert sum(lengths.values()) <= MAX_PRODUCT_LINES


def test_a_function_fits_on_a_screen() -> None:
    lengths = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in product()
        if path.parts[0] != "kernels"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_the_tests_mirror_the_tree() -> None:
    folders = {path.parent for path in sources("tests") if path.name.startswith("test_")} - {PurePosixPath("tests")}
    rooms = {path.parent for path in product()} | {PurePosixPath("stages")}
    strange = {str(folder) for folder in folders if folder.relative_to("tests") not in rooms}
    assert strange - FOLDERS_OF_TESTS_ALONE == set()


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
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~!; ]", name)[0]).lower()

    pins = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", pin)] == []
    project = PYPROJECT["project"]
    asked = {normal(name) for name in project["dependencies"] + project["optional-dependencies"]["test"]}
    assert asked - {normal(pin) for pin in pins} == set()

"""Where a model and the files beside it are: a folder here or in the package, or a hub id."""

from __future__ import annotations

from pathlib import Path

from stagemesh.config import hub
from stagemesh.config.errors import ConfigError

PACKAGE_ROOT = Path(__file__).parents[1]


def find_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The absolute folder of `model`, downloaded if need be. Raises ConfigError."""
    folder = local_folder(model)
    if folder is None and hub.is_repo_id(model):
        return hub.fetch(model, revision, download_dir)
    if folder is None:
        places = " and ".join(map(str, _places(model)))
        raise ConfigError("model", model, f"is not a folder (looked for {places}) nor a hub id such as org/name")
    if revision is not None:
        raise ConfigError("revision", revision, f"only a model of the hub has revisions; {folder} is a folder")
    return folder


def local_folder(model: str) -> Path | None:
    """The absolute folder `model`, if there is one."""
    return next((place.resolve() for place in _places(model) if place.is_dir()), None)


def read_chat_template(template: str) -> str:
    """A template's text, from a file or as it is. Raises ConfigError."""
    if any(mark in template for mark in "{}\n"):
        return template
    file = next((place for place in _places(template) if place.is_file()), None)
    if file is None:
        raise ConfigError("chat_template", template, "is neither a file nor a Jinja template, which has braces")
    return file.read_text(encoding="utf-8")


def _places(model: str) -> list[Path]:
    # The second makes config/models/demo work from any directory, a worker's too.
    return list(dict.fromkeys((Path.cwd() / Path(model).expanduser(), PACKAGE_ROOT / model)))

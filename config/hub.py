"""Models of the Hugging Face hub: from "org/name" to a folder on this machine.

A cached model needs no network. Pickles are refused: reading one may run any code. One process of a machine downloads,
the others wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stagemesh.config.checkpoint import INDEX_FILE, PICKLES, SINGLE_FILE, checkpoint_files, weight_map
from stagemesh.config.errors import ConfigError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SETTINGS = ("*.json", "*.jinja")
"""The files beside the weights."""


def is_repo_id(model: str) -> bool:
    return REPO_ID.fullmatch(model) is not None


def fetch(repo_id: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder of a model, named by its commit, downloaded if need be. Raises ConfigError.

    revision: branch, tag or commit; None = main. cache_dir: None = the hub library's own (HF_HUB_CACHE).
    """
    from filelock import FileLock
    from huggingface_hub import constants

    if (folder := _cached(repo_id, revision, cache_dir)) is not None:
        return folder
    locks = Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"stagemesh--{repo_id.replace('/', '--')}.lock"):
        # Another process may have fetched it while this one waited for the lock.
        return _cached(repo_id, revision, cache_dir) or _download(repo_id, revision, cache_dir)


def _cached(repo_id: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """The cached folder, if it is complete."""
    folder = cached_folder(repo_id, revision, cache_dir)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        checkpoint_files(folder)
    except ConfigError:  # a download that was broken off
        return None
    return folder


def cached_folder(repo_id: str, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """Where its config.json is, whatever else is there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _download(repo_id: str, revision: str | None, cache_dir: str | None) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    try:
        names = [file.rfilename for file in HfApi().model_info(repo_id, revision=revision).siblings or ()]
        _check_format(repo_id, names)
        # Patterns match across folders; names do not.
        settings = [name for name in names if "/" not in name and any(Path(name).match(kind) for kind in SETTINGS)]
        folder = Path(snapshot_download(repo_id, allow_patterns=settings, **where))
        snapshot_download(repo_id, allow_patterns=sorted(_weight_files(folder)), **where)
    except ConfigError:
        raise
    except errors.GatedRepoError:
        reason = "is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        raise ConfigError("model", repo_id, reason) from None
    except errors.RevisionNotFoundError:
        raise ConfigError("revision", revision, f"is no branch, tag or commit of {repo_id}") from None
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder here nor a repository on the hub; a private one needs HF_TOKEN"
        raise ConfigError("model", repo_id, reason) from None
    except Exception as error:  # whatever the network or the disk may do
        if (partial := cached_folder(repo_id, revision, cache_dir)) is not None:
            checkpoint_files(partial)  # says what is missing of it
        at = f" at revision {revision}" if revision else ""
        reason = (
            f"is no folder here, not in the hub's cache{at}, and cannot be fetched: {type(error).__name__}: {error}"
        )
        raise ConfigError("model", repo_id, reason) from error
    checkpoint_files(folder)
    return folder


def _check_format(repo_id: str, names: Iterable[str]) -> None:
    names = set(names)
    if "config.json" not in names:
        raise ConfigError("model", repo_id, "is not a model in Hugging Face layout: it has no config.json")
    if SINGLE_FILE in names or INDEX_FILE in names:
        return
    pickles = sorted(name for name in names if "/" not in name and any(Path(name).match(kind) for kind in PICKLES))
    reason = f"has neither {SINGLE_FILE} nor {INDEX_FILE}"
    if pickles:
        shown = ", ".join(pickles[:3]) + (", …" if len(pickles) > 3 else "")
        reason += (
            f"; {shown} is a pickle, which may run any code when it is read, and is not accepted: use a revision "
            "in safetensors format, or convert it"
        )
    raise ConfigError("model", repo_id, reason)


def _weight_files(folder: Path) -> set[str]:
    """The repository may hold the weights in other formats too."""
    index = folder / INDEX_FILE
    return set(weight_map(index).values()) if index.exists() else {SINGLE_FILE}

"""Models by hub id, against a cache laid out as the hub's library does, and a hub that is a few functions."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from support.model_folder import safetensors_bytes, write_model_folder

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model
from stagemesh.config.hub import fetch, is_repo_id

MAIN, OLD = "a" * 40, "b" * 40


def write_sharded(folder: Path) -> None:
    write_model_folder(folder)
    (folder / "model.safetensors").unlink()
    shards = {f"tensor-{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    for tensor, shard in shards.items():
        (folder / shard).write_bytes(safetensors_bytes(tensor))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


class Hub:
    """Repository org/model with branches main and old. Counts what is asked of it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = root / "cache"
        self.repo = root / "repo"
        self.repo.mkdir()
        write_sharded(self.repo)
        (self.repo / "tokenizer.json").write_text("{}")
        (self.repo / "original").mkdir()
        (self.repo / "original" / "params.json").write_text("{}")
        (self.repo / "consolidated.safetensors").write_bytes(b"the same weights again")
        self.downloaded: list[str] = []
        self.online = True
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot_download)

    def _names(self) -> list[str]:
        return [str(path.relative_to(self.repo)) for path in sorted(self.repo.rglob("*")) if path.is_file()]

    def _model_info(self, repo_id: str, *, revision: str | None = None) -> Any:
        if not self.online:
            raise ConnectionError("no route to the hub")
        if self.error is not None:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self._names()])

    def _snapshot_download(
        self, repo_id: str, *, allow_patterns: list[str], revision: str | None, cache_dir: str | None
    ) -> str:
        storage = Path(cache_dir or self.cache) / ("models--" + repo_id.replace("/", "--"))
        commit = {None: MAIN, "main": MAIN, "old": OLD}.get(revision, revision) or MAIN
        (storage / "refs").mkdir(parents=True, exist_ok=True)
        if commit != revision:
            (storage / "refs" / (revision or "main")).write_text(commit)
        folder = storage / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if not (folder / name).exists():
                time.sleep(0.01)
                (folder / name).write_bytes((self.repo / name).read_bytes())
                self.downloaded.append(name)
        return str(folder)

    def fetch(self, revision: str | None = None) -> Path:
        return fetch("org/model", revision, str(self.cache))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


def test_a_model_is_fetched_with_what_it_needs_and_nothing_else(hub: Hub) -> None:
    folder = hub.fetch()
    assert folder.name == MAIN
    assert sorted(hub.downloaded) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_what_the_cache_holds_needs_no_network(hub: Hub) -> None:
    folder = hub.fetch()
    hub.online = False
    assert hub.fetch() == folder == hub.fetch("main") == hub.fetch(MAIN)


def test_a_revision_is_pinned_by_branch_or_commit(hub: Hub) -> None:
    hub.fetch()
    assert hub.fetch("old").name == OLD
    hub.online = False
    assert hub.fetch(OLD).name == OLD
    with pytest.raises(ConfigError, match=f"not in the hub's cache at revision {'c' * 40}, and cannot be fetched"):
        hub.fetch("c" * 40)


def test_a_download_that_was_broken_off_is_completed(hub: Hub) -> None:
    shard = hub.fetch() / "model-00002-of-00002.safetensors"
    shard.unlink()
    hub.downloaded.clear()
    hub.fetch()
    assert hub.downloaded == [shard.name]


def test_offline_an_incomplete_model_is_refused_by_the_file_that_is_missing(hub: Hub) -> None:
    (hub.fetch() / "model-00002-of-00002.safetensors").unlink()
    hub.online = False
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors is missing"):
        hub.fetch()


def test_processes_of_one_machine_download_once(hub: Hub) -> None:
    threads = [threading.Thread(target=hub.fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.downloaded) == len(set(hub.downloaded)) == 5


def test_a_pickle_is_refused_with_the_reason_before_anything_is_downloaded(hub: Hub) -> None:
    for path in hub.repo.glob("model*"):
        path.unlink()
    (hub.repo / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"org/model.*pytorch_model\.bin is a pickle, which may run any code"):
        hub.fetch()
    assert hub.downloaded == []


def test_a_repository_that_is_no_model_is_refused(hub: Hub) -> None:
    (hub.repo / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        hub.fetch()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "model='org/model': is neither a folder here nor a repository"),
        ("RevisionNotFoundError", "revision='old': is no branch"),
        ("GatedRepoError", "model='org/model': is gated"),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(hub: Hub, name: str, message: str) -> None:
    kind = getattr(huggingface_hub.errors, name)
    hub.error = kind.__new__(kind)
    with pytest.raises(ConfigError, match=message):
        hub.fetch("old")


def test_the_engine_takes_a_hub_id_and_every_machine_its_commit(hub: Hub, tmp_path: Path) -> None:
    args = {"model": "org/model", "device": "cpu", "revision": "old", "download_dir": str(hub.cache)}
    config = EngineConfig.resolve(EngineArgs.parse(args))
    assert config.commit == OLD and config.served_model_names == ("org/model",)
    assert config.local_model_path() == Path(config.model_path)
    hub.cache.rename(tmp_path / "another machine's")
    hub.downloaded.clear()
    assert config.local_model_path().name == OLD and len(hub.downloaded) == 5


def test_a_folder_is_not_looked_up_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/model") == tmp_path / "org" / "model"
    with pytest.raises(ConfigError, match="only a model of the hub has revisions"):
        find_model("org/model", "main")
    with pytest.raises(ConfigError, match="nor a hub id such as org/name"):
        find_model("no-such-folder")
    assert hub.downloaded == []


def test_only_owner_and_name_make_a_hub_id() -> None:
    assert is_repo_id("meta-llama/Llama-3.1-8B") and is_repo_id("Qwen/Qwen2.5-0.5B")
    assert not any(map(is_repo_id, ["gpt2", "/models/llama", "./a/b", "../b", "a/b/c", "~/model", "a/", "C:\\a"]))

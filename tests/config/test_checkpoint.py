from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.model_folder import safetensors_bytes

from stagemesh.config.checkpoint import checkpoint_files
from stagemesh.config.errors import ConfigError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_sharded(folder: Path, **weight_map: str) -> None:
    (folder / SHARDS[0]).write_bytes(safetensors_bytes("a", "b"))
    (folder / SHARDS[1]).write_bytes(safetensors_bytes("c"))
    names = {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]} | weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_every_tensor_of_a_single_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes("a", "b"))
    assert checkpoint_files(tmp_path) == {"a": path, "b": path}


def test_every_tensor_of_a_sharded_checkpoint_is_found(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    assert checkpoint_files(tmp_path) == {
        "a": tmp_path / SHARDS[0],
        "b": tmp_path / SHARDS[0],
        "c": tmp_path / SHARDS[1],
    }


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        checkpoint_files(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin may run code when read"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path, kept: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes("a", "b")[:kept])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated"):
        checkpoint_files(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes("a") + b"xyz")
    with pytest.raises(ConfigError, match="3 bytes longer than its header says"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>an error page of a download</html>",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (10).to_bytes(8, "little") + b'{"a": "b"}',
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.safetensors its header is not that of a safetensors file"):
        checkpoint_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(ConfigError, match=f"{SHARDS[1]} is missing"):
        checkpoint_files(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, d=SHARDS[1])
    with pytest.raises(ConfigError, match=f"{SHARDS[1]} does not hold 'd'"):
        checkpoint_files(tmp_path)


def test_an_index_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    write_sharded(tmp_path, d="../elsewhere.safetensors")
    with pytest.raises(ConfigError, match="files of this folder"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model.safetensors.index.json must be a JSON object"):
        checkpoint_files(tmp_path)

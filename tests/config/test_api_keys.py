from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from support.harness import DEMO

from stagemesh.config.api_keys import key_hash, key_hashes
from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.fingerprint import fingerprint

SECRET = "sk-very-secret"


def test_keys_come_from_settings_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-file\n\n")
    environment = {"VLLM_API_KEY": "sk-vllm", "STAGEMESH_API_KEY": "sk-own", "HOME": "x"}
    hashes = key_hashes([SECRET, "sha256:" + key_hash("sk-hashed")], str(file), environment)
    assert set(hashes) == {key_hash(f"sk-{name}") for name in ("very-secret", "hashed", "file", "vllm", "own")}
    assert key_hash(SECRET) == hashlib.sha256(SECRET.encode()).hexdigest()
    assert key_hashes(None, None, {"VLLM_API_KEY": ""}) == ()


@pytest.mark.parametrize("key", ["", "two words", "sk-ü", "sha256:12", "a\n"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key='…'") as refused:
        key_hashes([key], None, {})
    assert not key or key not in str(refused.value)


def test_a_file_without_keys_does_not_open_the_door(tmp_path: Path) -> None:
    for content in ("", "# none\n"):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ConfigError, match="has no key"):
            key_hashes(None, str(tmp_path / "keys"), {})
    with pytest.raises(ConfigError, match="cannot be read"):
        key_hashes(None, str(tmp_path / "other"), {})


def test_keys_are_in_no_text_of_the_configuration_and_not_in_the_fingerprint() -> None:
    args = EngineArgs.parse({"model": str(DEMO), "device": "cpu", "api_key": [SECRET]})
    config = EngineConfig.resolve(args)
    assert config.api_key_hashes == (key_hash(SECRET),)
    for text in (repr(args), str(args), repr(config)):
        assert SECRET not in text and key_hash(SECRET) not in text
    other = EngineConfig.resolve(EngineArgs.parse({"model": str(DEMO), "device": "cpu"}))
    assert fingerprint(config) == fingerprint(other)
    with pytest.raises(ConfigError) as refused:
        EngineArgs.parse({"model": "x", "api_key": {"key": SECRET}})
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("value", ["https://a", ["https://a"], '["https://a"]', ['["https://a"]']])
def test_origins_are_a_list_or_what_a_command_line_has(value: object) -> None:
    assert EngineArgs.parse({"model": "x", "allowed_origins": value}).allowed_origins == ["https://a"]

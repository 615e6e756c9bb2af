"""vLLM's spellings of `serve`'s flags, brought into the one that typer reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from typer.core import TyperCommand

from stagemesh.config.base import did_you_mean
from stagemesh.config.errors import ConfigError
from stagemesh.config.vllm_flags import INERT, INERT_WITH_VALUE, UNSUPPORTED, inert_warning

LIST_FLAGS = {"--served-model-name", "--api-key"}
"""Take several words, and may repeat."""


class ServeCommand(TyperCommand):
    """A command whose flags may be written as vLLM's may, and stand in a file."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        known = {name: option for option in self.get_params(context) for name in (*option.opts, *option.secondary_opts)}
        words = [_dashes(word) for word in args]
        words = list(_without_inert(_with_file(words), known))
        words = list(_repeated(words))
        _refuse_unknown(words, known)
        return super().parse_args(context, words)


def _dashes(word: str) -> str:
    """--tensor_parallel_size=2 with dashes in the flag alone."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _with_file(words: Sequence[str]) -> list[str]:
    """The flags of `--config FILE` come first, except those that the command line has too."""
    file, rest = None, []
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag == "--config":
            file = value if equals else next(remaining, None)
            if file is None:
                raise ConfigError("config", None, "needs a file")
        else:
            rest.append(word)
    if file is None:
        return rest
    given = {word.partition("=")[0].replace("--no-", "--") for word in rest if word.startswith("--")}
    content = read_flags(Path(file))
    if rest and not rest[0].startswith("-"):
        given.add("--model")  # the positional one
    return [word for name, value in content.items() if name not in given for word in _as_words(name, value)] + rest


def read_flags(path: Path) -> dict[str, Any]:
    """Flag → value of a YAML file. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("config", str(path), f"cannot be read: {error}") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ConfigError("config", str(path), "must be a mapping of flags to values")
    if "applications" in content:
        raise ConfigError("config", str(path), f"is a Serve config file; run it with: stagemesh run {path}")
    return {_dashes("--" + name): value for name, value in content.items()}


def _as_words(flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        if flag in LIST_FLAGS:
            return [flag, *map(str, value)]
        return [flag, ",".join(map(str, value))]
    return [f"{flag}={value}"]


def _without_inert(words: Iterable[str], known: Mapping[str, Any]) -> Iterator[str]:
    """Take out what has no effect here, with one warning. Raises ConfigError for what is not supported."""
    found: dict[str, str] = {}
    remaining = iter(words)
    for word in remaining:
        flag, equals, _ = word.partition("=")
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_") if flag.startswith("--") else ""
        if flag not in known and name in UNSUPPORTED:
            raise ConfigError("", None, f"{flag} is not supported: {UNSUPPORTED[name]}")
        if flag in known or name not in INERT:
            yield word
        else:
            found[name] = INERT[name]
            if name in INERT_WITH_VALUE and not equals:
                next(remaining, None)
    if found:
        print(f"warning: {inert_warning(found)}", file=sys.stderr)


def _repeated(words: Iterable[str]) -> Iterator[str]:
    """--served-model-name a b as --served-model-name a --served-model-name b."""
    flag = ""
    for word in words:
        if word.startswith("-"):
            flag = word if word in LIST_FLAGS else ""
            if not flag:
                yield word
        elif flag:
            yield f"{flag}={word}"
        else:
            yield word


def _refuse_unknown(words: Iterable[str], known: Mapping[str, Any]) -> None:
    """Raises ConfigError with the nearest flag; typer would leave an unknown one among the positional words."""
    is_value = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if not is_value and word.startswith("-") and flag not in known:
            raise ConfigError("", None, f"unknown flag {flag}" + did_you_mean(flag, [*known, *_inert_flags()]))
        option = known.get(flag)
        is_value = not is_value and not getattr(option, "is_flag", True) and not equals


def _inert_flags() -> list[str]:
    return ["--" + name.replace("_", "-") for name in INERT]

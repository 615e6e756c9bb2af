"""A Hugging Face tokenizer, read without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.chat_template import ChatTemplate
from stagemesh.stages.text.detokenizer import (
    Detokenizer,
    IncrementalDetokenizer,
    StreamDetokenizer,
    TokenBytes,
    bytes_of_token,
)


class Tokenizer:
    """Encodes prompts and makes detokenizers. Any thread may use it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """chat_template: one, or by name: "default", "tool_use". special_tokens: by role: {"bos_token": "<s>"}."""
        # tokenizer.json may carry the settings of a training run; a served prompt is never cut or padded.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
        templates = {
            name: ChatTemplate(named[name], self._special_tokens) for name in ("default", "tool_use") if name in named
        }
        self.chat_template = templates.get("default", templates.get("tool_use"))
        self._tool_template = templates.get("tool_use", self.chat_template)
        # Its pickled state is that section of tokenizer.json; `to_str` would write the whole vocabulary.
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._bytes_of_token = bytes_of_token(decoder)
        self._special_ids = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._all_token_bytes: dict[frozenset[int], TokenBytes] = {}
        """By the ids that are skipped."""

    @classmethod
    def from_folder(cls, folder: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Only tokenizer.json must exist. ConfigError names a file that is missing or unreadable.

        chat_template: a text in place of the folder's own.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError("model", str(folder), "has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError("tokenizer.json", str(path), f"cannot be read: {error}") from error
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        template = chat_template or _read_chat_template(folder, settings)
        return cls(backend, chat_template=template, special_tokens=_special_tokens(settings))

    @cached_property
    def max_token_chars(self) -> int:
        """No token stands for more characters."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written in `text` become their ids, as in transformers. Releases the GIL."""
        # `encode` of one text holds the GIL (tokenizers 0.23), `encode_batch` does not.
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def template_for(self, *, has_tools: bool, own: str | None = None) -> ChatTemplate | None:
        """Some models have another chat template for conversations with tools. own: a request's, in their place."""
        if own is not None:
            return ChatTemplate(own, self._special_tokens)
        return self._tool_template if has_tools else self.chat_template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        own: str | None = None,
    ) -> str:
        """The prompt text; encode it without special tokens, the template wrote them. own: see `template_for`."""
        variables = variables or {}
        template = self.template_for(has_tools=bool(variables.get("tools")), own=own)
        if template is None:
            raise ConfigError("messages", messages, "this model has no chat template; use completions instead")
        return template.render(messages, variables)

    def detokenizer(self, *, skip_special_tokens: bool = True, shown: Collection[str] = ()) -> Detokenizer:
        """For one answer. shown: special tokens that are not skipped."""
        skipped = {i for token, i in self._special_ids.items() if skip_special_tokens and token not in shown}
        if self._bytes_of_token is None:
            return StreamDetokenizer(self._backend, skipped)
        return IncrementalDetokenizer(self._token_bytes(self._bytes_of_token, frozenset(skipped)))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, perhaps part of a character; special tokens written out."""
        if self._bytes_of_token is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        return self._token_bytes(self._bytes_of_token, frozenset())[token_id]

    def token(self, token_id: int) -> str:
        """As the vocabulary spells it, e.g. "Ġworld"; empty for an id past its end."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole answer, the same as streamed."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.finish()

    def _token_bytes(self, bytes_of: Callable[[str], bytes], skipped: frozenset[int]) -> TokenBytes:
        if skipped not in self._all_token_bytes:
            self._all_token_bytes[skipped] = TokenBytes(bytes_of, self._backend.id_to_token, skipped)
        return self._all_token_bytes[skipped]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(path.name, str(path), f"is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(path.name, str(path), "must hold a JSON object")
    return content


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name, from wherever a model has them: the files win."""
    template = settings.get("chat_template")
    if isinstance(template, list):  # older models ship several named ones
        templates = {entry["name"]: entry["template"] for entry in template}
    else:
        templates = {} if template is None else {"default": template}
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    return templates | {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    special_tokens = {}
    for name, token in settings.items():
        if name.endswith("_token") and isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            special_tokens[name] = token
    return special_tokens

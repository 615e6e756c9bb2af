"""A Hugging Face tokenizer, read without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.chat_template import ChatTemplate
from stagemesh.stages.text.detokenizer import IncrementalDetokenizer, TokenBytes


class Tokenizer:
    """Encodes prompts and makes detokenizers. Any thread may use it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """special_tokens: by role, e.g. {"bos_token": "<s>"}."""
        # tokenizer.json may carry the settings of a training run; a served prompt is never cut or padded.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, special_tokens or {})
        # Its pickled state is that section of tokenizer.json; `to_str` would write the whole vocabulary.
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        special_ids = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        self._token_bytes = {
            True: TokenBytes(decoder, backend.id_to_token, skipped_ids=special_ids),
            False: TokenBytes(decoder, backend.id_to_token),
        }

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Only tokenizer.json must exist. ConfigError names a file that is missing or unreadable."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError("model", str(folder), "has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError("tokenizer.json", str(path), f"cannot be read: {error}") from error
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        template = _read_chat_template(folder, settings)
        return cls(backend, chat_template=template, special_tokens=_special_tokens(settings))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written in `text` become their ids, as in transformers. Releases the GIL."""
        # `encode` of one text holds the GIL (tokenizers 0.23), `encode_batch` does not.
        return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """The prompt text; encode it without special tokens, the template wrote them.

        chat_template: in place of the model's.
        """
        if chat_template is not None:
            return ChatTemplate(chat_template, self._special_tokens).render(messages, variables or {})
        if self.chat_template is None:
            raise ConfigError("messages", messages, "this model has no chat template; use completions instead")
        return self.chat_template.render(messages, variables or {})

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """For one answer."""
        return IncrementalDetokenizer(self._token_bytes[skip_special_tokens])

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, perhaps part of a character; special tokens written out."""
        return self._token_bytes[False][token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole answer, the same as streamed."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.finish()


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


def _read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # older models ship several named ones
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    special_tokens = {}
    for name, token in settings.items():
        if name.endswith("_token") and isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            special_tokens[name] = token
    return special_tokens

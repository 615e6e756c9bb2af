"""What `LLM.get_tokenizer` gives: the model's tokenizer under transformers' names, without transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.detokenizer import Detokenizer
from stagemesh.stages.text.input import ChatInput, InputProcessor
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_use import ToolUse

Message = Mapping[str, Any]


class OpenTokenizer(Tokenizer):
    """The engine's tokenizer, with its parts in view."""

    def __init__(self, backend: tokenizers.Tokenizer, **settings: Any) -> None:
        super().__init__(backend, **settings)
        self.backend = backend
        self.special_tokens: dict[str, str] = dict(settings.get("special_tokens") or {})
        """By role: {"bos_token": "<s>"}."""


class NoText(Tokenizer):
    """In place of a tokenizer (`skip_tokenizer_init`), or where no text is wanted (`detokenize=False`)."""

    def __init__(self) -> None:
        self.chat_template = self._tool_template = None
        self._special_tokens = {}
        self.max_token_chars = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise no_tokenizer()

    def detokenizer(self, **_: Any) -> Detokenizer:
        return _NoDetokenizer()

    def token_bytes(self, token_id: int) -> bytes:
        return b""


def no_tokenizer() -> ConfigError:
    reason = "leaves no tokenizer: prompts must be token ids, and neither stop strings nor bad words can be told"
    return ConfigError("skip_tokenizer_init", True, reason)


class _NoDetokenizer(Detokenizer):
    def __init__(self) -> None:
        pass

    def feed(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


class ScriptTokenizer:
    """Names, defaults and results of transformers' fast tokenizers, as far as they make prompts and read answers."""

    is_fast = True

    def __init__(self, tokenizer: OpenTokenizer, folder: str | Path, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._input = InputProcessor(tokenizer, vocab_size=2**31, max_model_len=2**31)
        self.backend_tokenizer = tokenizer.backend
        """The `tokenizers` library's own object."""
        self.special_tokens_map = dict(tokenizer.special_tokens)
        self.name_or_path = str(folder)
        self.model_max_length = max_model_len
        added = tokenizer.backend.get_added_tokens_decoder()
        self.all_special_ids = sorted(id for id, token in added.items() if token.special)
        self.all_special_tokens = [added[id].content for id in self.all_special_ids]

    def __getattr__(self, name: str) -> Any:
        """bos_token, eos_token, pad_token, unk_token and others, and their ids; None for one that the model lacks."""
        if name.endswith("_token_id") and not name.startswith("_"):
            token = self.special_tokens_map.get(name.removesuffix("_id"))
            return None if token is None else self.backend_tokenizer.token_to_id(token)
        if name.endswith("_token") and not name.startswith("_"):
            return self.special_tokens_map.get(name)
        raise AttributeError(f"the tokenizer has no attribute {name!r}")

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Without added tokens; `len()` counts those too."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def chat_template(self) -> str | None:
        return None if self._tokenizer.chat_template is None else self._tokenizer.chat_template.source

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        """{"input_ids", "attention_mask"}: lists of ids, or lists of such lists for several texts."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens=add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        several = [self.encode(one, add_special_tokens=add_special_tokens) for one in text]
        return {"input_ids": several, "attention_mask": [[1] * len(ids) for ids in several]}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def tokenize(self, text: str) -> list[str]:
        return [str(self.convert_ids_to_tokens(id)) for id in self.encode(text, add_special_tokens=False)]

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | None | list[str | None]:
        """None for an id that the vocabulary lacks."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        kept = (id for id in ids if not (skip_special_tokens and id in self.all_special_ids))
        return [self.backend_tokenizer.id_to_token(id) for id in kept]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | None | list[int | None]:
        """That of unk_token, or None, for a token that the vocabulary lacks."""
        if isinstance(tokens, str):
            id = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if id is None else id
        return [self.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **variables: Any,
    ) -> Any:
        """The prompt of one conversation, or a list for several: token ids, their dict, or with tokenize=False text."""
        is_one = bool(conversation) and isinstance(conversation[0], Mapping)
        conversations: Any = [conversation] if is_one else conversation
        texts = [
            self._input.render(
                ChatInput(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template=chat_template,
                    template_variables={**variables, "documents": documents} if documents else variables,
                ),
                ToolUse(tools=tools or ()),
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts[0] if is_one else texts
        encoded = self(texts[0] if is_one else texts, add_special_tokens=False)
        return encoded if return_dict else encoded["input_ids"]

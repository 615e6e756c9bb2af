"""Token ids to text: bytes, whole characters, stop strings."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class TokenBytes(dict[int, bytes]):
    """The bytes that each token id adds to the text, filled on first use."""

    def __init__(
        self,
        bytes_of_token: Callable[[str], bytes],
        token_of_id: Callable[[int], str | None],
        skipped_ids: Collection[int] = (),
    ) -> None:
        super().__init__()
        self._bytes_of_token = bytes_of_token
        self._token_of_id = token_of_id
        self._skipped_ids = frozenset(skipped_ids)

    def __missing__(self, token_id: int) -> bytes:
        # Ids past the tokenizer's own (a head padded to a round size) have no token and add nothing.
        token = None if token_id in self._skipped_ids else self._token_of_id(token_id)
        self[token_id] = token_bytes = b"" if token is None else self._bytes_of_token(token)
        return token_bytes


class Detokenizer(Protocol):
    """Turns one answer's token ids into text. The pieces do not depend on how the ids were cut."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became certain, possibly empty."""

    def finish(self) -> str:
        """What was held back."""


class IncrementalDetokenizer:
    """Turns one answer's token ids into text, whole characters only.

    The pieces, `finish()` included, are the UTF-8 decoding of all bytes, U+FFFD where they are no character. A leading
    space is kept: an answer continues its prompt.
    """

    __slots__ = ("_bytes_of", "_decode")

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes_of = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became certain, possibly empty."""
        if len(token_ids) == 1:
            return self._decode(self._bytes_of[token_ids[0]])
        return self._decode(b"".join([self._bytes_of[token_id] for token_id in token_ids]))

    def finish(self) -> str:
        """What was held back."""
        return self._decode(b"", True)


class StreamDetokenizer:
    """For decoders whose tokens depend on their neighbours: as the tokenizers library decodes the whole."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped_ids: Collection[int] = ()) -> None:
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._token_ids: list[int] = []
        self._num_chars = 0
        """Given out."""
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=False)
        """None once the decoder took back what it had given: the rest comes at the end."""

    def feed(self, token_ids: Sequence[int]) -> str:
        texts = [self._step(token_id) for token_id in token_ids if token_id not in self._skipped_ids]
        return "".join(texts)

    def finish(self) -> str:
        return self._backend.decode(self._token_ids, skip_special_tokens=False)[self._num_chars :]

    def _step(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        if self._stream is None:
            return ""
        try:
            text = self._stream.step(self._backend, token_id) or ""
        except Exception:  # the library raises bare Exception
            self._stream = None
            return ""
        self._num_chars += len(text)
        return text


class StopStrings:
    """Cuts a stream of text before the first stop string. What may be the beginning of one is held back.

    The stop string that is complete first wins; of two complete at the same character, the longer.
    """

    __slots__ = ("_keep", "_longest", "_stops", "_undecided", "hit")

    def __init__(self, stops: Iterable[str], *, keep: bool = False) -> None:
        """keep: cut behind the stop string."""
        self._stops = tuple(stops)
        self._keep = keep
        self._longest = max(map(len, self._stops), default=0)
        self._undecided = ""
        self.hit: str | None = None
        """The stop string that cut the text."""

    def feed(self, text: str) -> str:
        """Text that is certainly before the cut, possibly empty."""
        if self.hit is not None or not text:
            return ""
        text = self._undecided + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self._undecided = ""
            end, start, self.hit = min(matches)
            return text[: end if self._keep else start]
        safe = self._first_possible_start(text)
        self._undecided = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back."""
        text, self._undecided = self._undecided, ""
        return text

    def _first_possible_start(self, text: str) -> int:
        """Start of the longest suffix that is a proper prefix of a stop string, or len(text)."""
        first = len(text)
        earliest = max(0, len(text) - self._longest + 1)
        for stop in self._stops:
            start = text.find(stop[0], earliest)
            while 0 <= start < first:
                if stop.startswith(text[start:]):
                    first = start
                start = text.find(stop[0], start + 1)
        return first


def bytes_of_token(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    """The bytes of each token by a decoder of tokenizer.json: byte-level BPE (Llama 3, Qwen) or SentencePiece with byte
    fallback (Llama 2, Mistral). None for any other, where they depend on the tokens around."""
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if "ByteFallback" in kinds and kinds <= _SENTENCEPIECE_DECODERS:
        return _sentencepiece_bytes
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token, written as itself
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

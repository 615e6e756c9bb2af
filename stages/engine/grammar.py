"""Structured outputs (JSON schema, regex, choice, grammar), by llguidance, on the leader.

A grammar's state follows from the answer so far, which the leader keeps when the workers are lost.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import llguidance
import numpy as np

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import StructuredOutputsParams
from stagemesh.stages.engine.json_schema import closed

# On one line, as `json.dumps` writes it: where blanks are free, a small model spends most of its tokens on them.
_JSON_OPTIONS: llguidance._lib.JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

MAX_CHARS = 256 * 1024
"""Of a schema or all choices."""
MAX_GRAMMAR_CHARS, MAX_REGEX_CHARS = 32 * 1024, 8 * 1024
"""What longer ones say in few symbols, such as 20 000 optional letters, takes a second per mask or more."""
MAX_DEPTH = 1000
"""Of rules and brackets, or of a schema's references times half its nesting: llguidance follows a chain of them by
recursion, and to exhaust the stack would end the process (on a thread of 8 MiB 1000 rules are well, 3000 are not)."""
# A compilation or a mask that reaches one of these ends with an error instead of holding the engine's thread.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=50_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)

TokenMask = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""One bit per token id, the lowest first in each byte."""


def token_mask(token_ids: Sequence[int]) -> TokenMask:
    """The shortest mask of `token_ids`, at least one."""
    bits = np.zeros(max(token_ids) + 1, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little")


def _union(first: TokenMask, second: TokenMask) -> TokenMask:
    both = np.zeros(max(len(first), len(second)), np.uint8)
    both[: len(first)] = first
    both[: len(second)] |= second
    return both


class Grammar:
    def __init__(self, matcher: llguidance.LLMatcher, eos_only: TokenMask) -> None:
        self._matcher = matcher
        self._eos_only = eos_only
        self._consumed = array("i")
        self.error = ""
        """Why only EOS may follow an incomplete answer; empty if all is well."""

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        """The tokens that may follow: EOS among them where the answer may end, alone where it must.

        Cheap for an answer that grows token by token.
        """
        output = array("i", output_token_ids)
        num_consumed = len(self._consumed)
        if output[:num_consumed] != self._consumed:
            self._matcher.reset()
            num_consumed = 0
        new = output[num_consumed:].tolist()
        if new and not self._is_over():
            self._matcher.consume_tokens(new)
        self._consumed = output
        if not self._is_over():
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if not self._is_over():  # computing may have met a limit
                return mask
        return self._eos_only

    def _is_over(self) -> bool:
        if self._matcher.is_error():
            self.error = f"the answer could not be kept to its form: {self._matcher.get_error()}"
            return True
        return self._matcher.is_stopped()


class GrammarAfterReasoning(Grammar):
    """Holds from behind the token that completes the end of the reasoning on. Until then only EOS is forbidden."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        eos_only: TokenMask,
        all_but_eos: TokenMask,
        bytes_of: Callable[[int], bytes],
        opening_id: int | None,
        end: str,
    ) -> None:
        """opening_id, end: see SamplingParams.structured_outputs_after."""
        super().__init__(matcher, eos_only)
        self._all_but_eos = all_but_eos
        self._bytes_of = bytes_of
        self._opening_id = opening_id
        self._end = end.encode()
        self._seen = array("i")
        self._tail = b""
        self._num_reasoning: int | None = None
        """Tokens up to the end of reasoning in `_seen`."""

    def mask(self, output_token_ids: Sequence[int]) -> TokenMask:
        if self._opening_id is not None and not output_token_ids:
            mask = super().mask(())
            return _union(mask, token_mask([self._opening_id]))
        if self._opening_id is not None and output_token_ids[0] != self._opening_id:
            return super().mask(output_token_ids)
        self._read(array("i", output_token_ids))
        if self._num_reasoning is None:
            return self._all_but_eos
        return super().mask(output_token_ids[self._num_reasoning :])

    def _read(self, output: array[int]) -> None:
        num_seen = len(self._seen)
        if output[:num_seen] != self._seen:
            num_seen, self._tail, self._num_reasoning = 0, b"", None
        for i in range(num_seen, len(output) if self._num_reasoning is None else 0):
            self._tail += self._bytes_of(output[i])
            if self._end in self._tail:
                self._num_reasoning = i + 1
                break
            self._tail = self._tail[1 - len(self._end) :]
        self._seen = output


class GrammarFactory:
    """Makes the grammars of one model. Any thread may use it."""

    def __init__(self, model_path: str | Path, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self._path = Path(model_path) / "tokenizer.json"
        # Configurations name ids that the model has not, or -1 for none.
        self._eos_token_ids = sorted(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
        self._vocab_size = vocab_size
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def make(self, form: StructuredOutputsParams, after: tuple[int | None, str] | None = None) -> Grammar:
        """after: see SamplingParams.structured_outputs_after.

        Raises ConfigError for an invalid grammar, and for a model without tokenizer or EOS.
        """
        tokenizer = self._loaded()
        matcher = llguidance.LLMatcher(tokenizer, _definition(form), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(form, matcher.get_error())
        eos_only = token_mask(self._eos_token_ids)
        if after is None:
            return Grammar(matcher, eos_only)
        all_but_eos = token_mask([i for i in range(self._vocab_size) if i not in self._eos_token_ids])

        def bytes_of(token_id: int) -> bytes:
            return tokenizer.decode_bytes([token_id]) if token_id < tokenizer.vocab_size else b""

        return GrammarAfterReasoning(matcher, eos_only, all_but_eos, bytes_of, *after)

    def _loaded(self) -> llguidance.LLTokenizer:
        """Read on first use: a large vocabulary takes a second."""
        with self._lock:
            if self._tokenizer is None:
                if not self._path.is_file() or not self._eos_token_ids:
                    raise ConfigError(
                        "structured_outputs", str(self._path.parent), "needs a model with tokenizer.json and EOS ids"
                    )
                text = self._path.read_text(encoding="utf-8")
                # An lm_head padded to a round size has more ids than the tokenizer; ids that only the tokenizer has
                # are never sampled.
                min_vocab_size = llguidance.LLTokenizer(text, eos_token=self._eos_token_ids, slices=[]).vocab_size
                self._tokenizer = llguidance.LLTokenizer(
                    text, n_vocab=max(self._vocab_size, min_vocab_size), eos_token=self._eos_token_ids
                )
            return self._tokenizer


def check(form: StructuredOutputsParams) -> None:
    """Raises ConfigError for an invalid grammar. Needs no tokenizer."""
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(_definition(form), limits=_LIMITS)
    if is_error:
        raise _refusal(form, messages[0])


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise ValueError(f"longer than {most} characters")


def _definition(form: StructuredOutputsParams) -> str:
    """In llguidance's language. Raises ConfigError."""
    try:
        schema = None if form.json is None else form.json_schema
        _check_length(sum(map(len, form.choice or (schema or "",))), MAX_CHARS)
        _check_length(len(form.regex or ""), MAX_REGEX_CHARS)
        _check_length(len(form.grammar or ""), MAX_GRAMMAR_CHARS)
        if schema is not None:
            value = json.loads(schema)
            num_references = json.dumps(value).count('"$ref"')  # written anew, as a key may be spelled with escapes
            _check_depth((num_references + 1) * _nesting(value) // 2)
            return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(closed(value)), defaults=_JSON_OPTIONS)
        if form.json_object:
            return llguidance.LLMatcher.grammar_from_json_schema('{"type":"object"}', defaults=_JSON_OPTIONS)
        if form.regex is not None:
            return llguidance.LLMatcher.grammar_from_regex(form.regex)
        if form.choice is not None:
            # A rule may have 2000 branches only, a terminal more.
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in form.choice)
            return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        assert form.grammar is not None
        # Each rule has a colon, each level of nesting a bracket.
        _check_depth(sum(map(form.grammar.replace("::=", ":").count, ":([{")))
        return llguidance.grammar_from("grammar", form.grammar)
    except (ValueError, RecursionError) as error:
        raise _refusal(form, str(error)) from error


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"rules or references may lie {depth} deep, {MAX_DEPTH} is the most")


def _nesting(value: object) -> int:
    """Of JSON. Raises RecursionError."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_nesting, children), default=0)


def _refusal(form: StructuredOutputsParams, reason: str) -> ConfigError:
    name = next(name for name in form.__struct_fields__ if getattr(form, name) is not None)
    return ConfigError(f"structured_outputs.{name}", getattr(form, name), f"cannot be used: {reason.strip()}")

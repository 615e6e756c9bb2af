"""What a model thinks before it answers, told from the answer, whatever pieces the text comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from stagemesh.config.errors import ConfigError


class SplitText(NamedTuple):
    reasoning: str
    content: str


class ReasoningParser:
    """Splits one answer: reasoning from `start` to `end`, then content. Blanks beside the marks are dropped."""

    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    is_implied: ClassVar[bool]
    """Whether an answer is reasoning until `end` even where nothing says so: not the prompt's end, not `start`."""

    def __init__(self, *, is_open: bool, is_shown: bool = True) -> None:
        """is_open: the answer begins within reasoning. is_shown: else it is dropped."""
        self.is_over = False
        """The content has begun."""
        self.has_reasoning = is_open
        self._is_shown = is_shown
        self._is_started = False
        self._is_blank = True
        self._unread = ""

    @classmethod
    def is_open_after(cls, prompt: str, variables: Mapping[str, Any]) -> bool | None:
        """Whether the answer to a prompt begins within reasoning; None where it has none.

        variables: of the chat template, which opens or closes the reasoning at the prompt's end.
        """
        prompt = prompt.rstrip()
        if variables.get("enable_thinking") is False or prompt.endswith(cls.end):
            return None
        return cls.is_implied or prompt.endswith(cls.start)

    @property
    def marks(self) -> tuple[str, str]:
        return self.start, self.end

    def feed(self, text: str) -> SplitText:
        """What became certain with `text`."""
        self._unread += text
        if not self._is_started and not self._start():
            return SplitText("", "")
        reasoning = ""
        if self.has_reasoning and not self.is_over:
            if self._is_blank:
                self._unread = self._unread.lstrip()
            reasoning, mark, rest = self._unread.partition(self.end)
            if mark:
                self.is_over, self._is_blank = True, True
                reasoning = reasoning.rstrip()
            else:
                reasoning = reasoning[: self._certain_length(reasoning)]
                self._is_blank = self._is_blank and not reasoning
                rest = self._unread[len(reasoning) :]
            self._unread = rest
        return SplitText(reasoning if self._is_shown else "", self._content() if self.is_over else "")

    def finish(self) -> SplitText:
        """What was held back."""
        text, self._unread = self._unread, ""
        if self.is_over or not self.has_reasoning:
            return SplitText("", "" if self.has_reasoning else text)
        return SplitText(text.rstrip() if self._is_shown else "", "")

    def _start(self) -> bool:
        """Whether the beginning is known; takes `start` away."""
        text = self._unread.lstrip()
        if self.start.startswith(text) and text != self.start:
            return False
        self._is_started = True
        if text.startswith(self.start):
            self.has_reasoning, self._unread = True, text.removeprefix(self.start)
        self.is_over = not self.has_reasoning
        return True

    def _content(self) -> str:
        text, self._unread = self._unread, ""
        if self.has_reasoning and self._is_blank:
            text = text.lstrip()
            self._is_blank = not text
        return text

    def _certain_length(self, text: str) -> int:
        """Length without a partial mark at the end and blanks before it."""
        partial = next((n for n in range(len(self.end) - 1, 0, -1) if text.endswith(self.end[:n])), 0)
        return len(text[: len(text) - partial].rstrip())


class DeepSeekR1(ReasoningParser):
    is_implied = True


class Qwen3(ReasoningParser):
    is_implied = False


REASONING: dict[str, type[ReasoningParser]] = {"deepseek_r1": DeepSeekR1, "qwen3": Qwen3}
"""By vLLM's names. A new form is a class and a line here."""


def reasoning_named(name: str) -> type[ReasoningParser]:
    """Raises ConfigError."""
    if name not in REASONING:
        raise ConfigError("reasoning_parser", name, f"must be one of {', '.join(REASONING)}")
    return REASONING[name]

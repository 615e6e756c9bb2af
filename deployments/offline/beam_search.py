"""Beam search over the tokens' log-probabilities, one call of `LLM.generate` per token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import NO_LIMIT, SamplingParams
from stagemesh.deployments.offline.outputs import Logprob, RequestOutput

MAX_BEAM_WIDTH = 1024


@dataclass
class BeamSearchParams:
    """Raises ConfigError."""

    beam_width: int
    """Sequences that are kept at each token, and returned; in [1, 1024]."""
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Accepted as in vLLM, where log-probabilities are those before the temperature too: it changes nothing."""
    length_penalty: float = 1.0
    """Scores are divided by length to this power, prompt included: above 1 longer answers win."""
    include_stop_str_in_output: bool = False
    """Without effect: there are no stop strings."""
    structured_outputs: None = None

    def __post_init__(self) -> None:
        for name, most in {"beam_width": MAX_BEAM_WIDTH, "max_tokens": NO_LIMIT}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(name, value, f"must be an integer within [1, {most}]")
        if self.structured_outputs is not None:
            raise ConfigError("structured_outputs", self.structured_outputs, "beams cannot be given a form")


@dataclass
class BeamSearchSequence:
    orig_prompt: Any
    tokens: list[int]
    """The prompt's too."""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    """Per generated token: the candidates."""
    cum_logprob: float = 0.0
    text: str | None = None
    """Of all tokens."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The EOS id that ended it."""


@dataclass
class BeamSearchOutput:
    sequences: list[BeamSearchSequence]
    """The best one first."""


class BeamSearch:
    """One prompt's beams."""

    def __init__(self, prompt: Any, tokens: list[int], params: BeamSearchParams, eos_ids: Collection[int]) -> None:
        self.beams = [BeamSearchSequence(prompt, tokens)]
        self._completed: list[BeamSearchSequence] = []
        self._params = params
        self._eos_ids = eos_ids

    def extend(self, outputs: Sequence[RequestOutput]) -> None:
        """Replace the beams by the best of their continuations. outputs: of each beam, with log-probabilities."""
        grown = []
        for beam, output in zip(self.beams, outputs, strict=True):
            candidates = (output.outputs[0].logprobs or [{}])[0]
            for token_id, entry in candidates.items():
                longer = BeamSearchSequence(
                    beam.orig_prompt,
                    [*beam.tokens, token_id],
                    [*beam.logprobs, candidates],
                    beam.cum_logprob + entry.logprob,
                )
                if token_id in self._eos_ids and not self._params.ignore_eos:
                    longer.finish_reason, longer.stop_reason = "stop", token_id
                    self._completed.append(longer)
                else:
                    grown.append(longer)
        self.beams = self._best(grown)

    def end(self, beams: list[BeamSearchSequence]) -> None:
        """These can grow no further."""
        for beam in beams:
            beam.finish_reason = "length"
        self._completed += beams
        self.beams = [beam for beam in self.beams if beam.finish_reason is None]

    def output(self) -> BeamSearchOutput:
        self.end(self.beams)
        return BeamSearchOutput(self._best(self._completed))

    def _best(self, sequences: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(sequences, key=self._score, reverse=True)[: self._params.beam_width]

    def _score(self, sequence: BeamSearchSequence) -> float:
        """As in transformers and vLLM: an EOS at the end is not counted."""
        length = len(sequence.tokens) - (sequence.tokens[-1] in self._eos_ids)
        return float(sequence.cum_logprob / max(1, length) ** self._params.length_penalty)


def search(
    searches: Sequence[BeamSearch],
    params: BeamSearchParams,
    *,
    max_model_len: int,
    vocab_size: int,
    generate: Callable[[list[list[int]], SamplingParams], list[RequestOutput]],
) -> list[BeamSearchOutput]:
    """Run all together. generate: answers prompts of token ids."""
    # Twice as many candidates as beams: even if half of them end, all beams go on.
    step = SamplingParams(max_tokens=1, temperature=0.0, seed=0, logprobs=min(2 * params.beam_width, vocab_size))
    for _ in range(params.max_tokens):
        prompts = [beam.tokens for one in searches for beam in one.beams]
        if not prompts:
            break
        outputs = iter(generate(prompts, step))
        for one in searches:
            one.extend([next(outputs) for _ in one.beams])
            one.end([beam for beam in one.beams if len(beam.tokens) >= max_model_len])
    return [one.output() for one in searches]

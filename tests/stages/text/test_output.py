"""From the tokens of a lane to what readers see of one answer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import SamplingParams
from stagemesh.stages.messages.request import EngineRequest, LaneError, TokenDelta
from stagemesh.stages.messages.step import TokenLogprobs
from stagemesh.stages.text.output import LEAST_LOGPROB, OutputProcessor, TextDelta, embedding_of
from stagemesh.stages.text.reasoning import Qwen3
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_calls import NamedParser, OfferedTools, ToolCall
from stagemesh.stages.text.tool_formats import Hermes


class Answer:
    """Feeds an OutputProcessor the bytes of a text, one token each."""

    def __init__(self, tokenizer: Tokenizer, parser: Any = None, reasoning: Any = None, **params: Any) -> None:
        self.tokenizer = tokenizer
        request = EngineRequest("r", [1], SamplingParams(**{"max_tokens": 100, **params}))
        self.output = OutputProcessor(0, request, tokenizer, parser, reasoning_parser=reasoning)

    def say(self, text: str | bytes, finish_reason: str | None = None, **fields: Any) -> TextDelta:
        data = text.encode() if isinstance(text, str) else text
        token_ids = [self.token_id(byte) for byte in data]
        offset = len(self.output.token_ids)
        return self.output.process(TokenDelta("r", offset, token_ids, finish_reason, **fields))

    def token_id(self, byte: int) -> int:
        return next(i for i in range(256) if self.tokenizer.token_bytes(i) == bytes([byte]))


def test_deltas_add_up_to_the_whole(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer)
    deltas = [answer.say("Hel"), answer.say("lo"), answer.say("!", "length")]
    assert "".join(delta.text for delta in deltas) == answer.output.text == "Hello!"
    assert sum((delta.token_ids for delta in deltas), []) == answer.output.token_ids
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
    assert answer.output.stop_reason is None


def test_a_part_of_a_character_is_held_back_and_its_tokens_are_not(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer)
    first = answer.say("ä".encode()[:1])
    assert (first.text, len(first.token_ids)) == ("", 1)
    assert answer.say("ä".encode()[1:]).text == "ä"
    assert answer.say("🙂".encode()[:3], "length").text == "\ufffd"


@pytest.mark.parametrize("cuts", [[1] * 8, [3, 5], [8]])
@pytest.mark.parametrize(("keep", "text"), [(False, "abc"), (True, "abcdef")])
def test_a_stop_string_ends_the_answer_wherever_tokens_are_cut(
    tokenizer: Tokenizer, cuts: list[int], keep: bool, text: str
) -> None:
    answer = Answer(tokenizer, stop=["def", "zz"], include_stop_str_in_output=keep)
    said = "abcdefgh"
    for cut in cuts:
        if answer.output.finish_reason is None:
            answer.say(said[:cut], "length" if cut == len(said) else None)
            said = said[cut:]
    assert (answer.output.text, answer.output.finish_reason, answer.output.stop_reason) == (text, "stop", "def")
    assert len(answer.output.token_ids) == 6, "up to the token that completed it"


def test_an_explicit_stop_token_is_the_reason_and_eos_is_none(tokenizer: Tokenizer) -> None:
    stopped = Answer(tokenizer, stop_token_ids=[9])
    stopped.output.process(TokenDelta("r", 0, [9], "stop", stop_token_id=9))
    assert (stopped.output.text, stopped.output.stop_reason, stopped.output.token_ids) == ("", 9, [9])
    ended = Answer(tokenizer)
    ended.output.process(TokenDelta("r", 0, [9], "stop", stop_token_id=9))
    assert (ended.output.finish_reason, ended.output.stop_reason) == ("stop", None)


def test_logprobs_are_decoded_and_count_the_characters_before_them(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, logprobs=1, prompt_logprobs=0)
    a, b = answer.token_id(ord("a")), answer.token_id(ord("b"))
    delta = TokenDelta("r", 0, [a, b], "length")
    delta.logprobs = [TokenLogprobs(a, -0.5, 1, [a], [-0.5]), TokenLogprobs(b, -math.inf, 9, [a], [-0.1])]
    delta.prompt_logprobs = [TokenLogprobs(b, -2.0, 3, [], [])]
    logprobs = answer.output.process(delta).logprobs
    assert [(entry.token, entry.bytes, entry.offset) for entry in logprobs] == [("a", b"a", 0), ("b", b"b", 1)]
    assert [entry.logprob for entry in logprobs] == [-0.5, LEAST_LOGPROB]
    assert [(top.token, top.rank) for top in logprobs[1].top] == [("a", 1)]
    assert answer.output.logprobs == logprobs
    assert [entry.token for entry in answer.output.prompt_logprobs or []] == ["b"]


def test_calls_leave_the_text_and_change_the_finish_reason(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, Hermes(OfferedTools([{"name": "f"}])))
    said = 'Look: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    deltas = [answer.say(said[i : i + 7]) for i in range(0, len(said), 7)]
    deltas.append(answer.output.process(TokenDelta("r", len(answer.output.token_ids), [], "stop")))
    assert answer.output.text == "".join(delta.text for delta in deltas) == "Look:"
    (call,) = answer.output.tool_calls
    assert (call.name, call.arguments) == ("f", '{"a": 1}')
    assert deltas[-1].finish_reason == answer.output.finish_reason == "tool_calls"


def test_a_named_function_ends_with_stop(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, NamedParser("f"))
    answer.say("{}", "stop")
    assert [(call.name, call.arguments) for call in answer.output.tool_calls] == [("f", "{}")]
    assert isinstance(answer.output.tool_calls[0], ToolCall) and answer.output.finish_reason == "stop"


@pytest.mark.parametrize(
    ("delta", "status"),
    [
        (TokenDelta("r", 1, [5]), "internal"),
        (TokenDelta("r", 0, [], "error", error="why"), "internal"),
        (TokenDelta("r", 0, [], "abort"), "lost"),
    ],
)
def test_what_a_lane_must_not_send_is_an_error(tokenizer: Tokenizer, delta: TokenDelta, status: str) -> None:
    with pytest.raises(LaneError) as caught:
        Answer(tokenizer).output.process(delta)
    assert caught.value.status == status


def test_a_form_that_no_answer_has_is_the_users_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="nothing fits"):
        Answer(tokenizer).output.process(TokenDelta("r", 0, [5], "unsatisfiable", error="nothing fits"))


def test_a_lane_without_a_vector_is_an_error() -> None:
    assert embedding_of(TokenDelta("r", 0, [], "stop", embedding=b"1234")) == b"1234"
    with pytest.raises(LaneError, match="gave no vector"):
        embedding_of(TokenDelta("r", 0, [], "stop"))


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("stop", [(), ("END",)])
def test_reasoning_comes_before_text_and_calls_and_is_counted(tokenizer: Tokenizer, size: int, stop: Any) -> None:
    answer = Answer(tokenizer, Hermes(OfferedTools([{"name": "f"}])), Qwen3(is_open=False), stop=stop)
    thought = "<think>\nMay I <tool_call>?\n</think>"
    said = thought + '\n\nLook: <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    deltas = [answer.say(said[i : i + size]) for i in range(0, len(said), size)]
    deltas.append(answer.output.process(TokenDelta("r", len(answer.output.token_ids), [], "stop")))
    assert "".join(delta.reasoning for delta in deltas) == answer.output.reasoning == "May I <tool_call>?"
    assert "".join(delta.text for delta in deltas) == answer.output.text == "Look:"
    assert [call.name for call in answer.output.tool_calls] == ["f"]
    assert answer.output.num_reasoning_tokens == len(thought)


def test_an_answer_without_reasoning_counts_none_and_one_cut_off_is_all_reasoning(tokenizer: Tokenizer) -> None:
    plain = Answer(tokenizer, reasoning=Qwen3(is_open=False))
    plain.say("<thin air>", "stop")
    assert (plain.output.text, plain.output.reasoning, plain.output.num_reasoning_tokens) == ("<thin air>", "", 0)
    cut = Answer(tokenizer, reasoning=Qwen3(is_open=True))
    cut.say("Hm <", "length")
    assert (cut.output.text, cut.output.reasoning, cut.output.num_reasoning_tokens) == ("", "Hm <", 4)

"""From what users write to the requests that a lane takes."""

from __future__ import annotations

from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams, StructuredOutputsParams
from stagemesh.stages.text.input import ChatInput, InputProcessor, PromptTooLong, bad_words_token_ids
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_calls import HermesParser, NamedParser, ObjectsParser

PARAMS = SamplingParams(max_tokens=8)
USER = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


@pytest.fixture
def processor(tokenizer: Tokenizer) -> InputProcessor:
    return InputProcessor(tokenizer, vocab_size=257, max_model_len=40, seed=5)


def test_every_choice_of_every_prompt_is_a_request_of_its_own(processor: InputProcessor) -> None:
    first, second = processor.process_prompts(["ab", [1, 2, 3]], SamplingParams(n=2, seed=7), "id")
    assert (first.text, second.text) == ("ab", None)
    assert first.token_ids[0] == 256 and second.token_ids == [1, 2, 3]
    requests = [*first.requests, *second.requests]
    assert [request.request_id for request in requests] == ["id-0", "id-1", "id-2", "id-3"]
    assert [request.params.seed for request in requests] == [7, 8, 7, 8]
    assert [len(request.prompt_token_ids) for request in requests] == [3, 3, 3, 3]


def test_a_request_without_a_seed_gets_one_that_the_seed_of_the_processor_fixes(tokenizer: Tokenizer) -> None:
    def seeds(seed: int | None) -> list[Any]:
        processor = InputProcessor(tokenizer, vocab_size=257, max_model_len=40, seed=seed)
        (prompt,) = processor.process_prompts(["a"], SamplingParams(n=3), "id")
        return [request.params.seed for request in prompt.requests]

    assert seeds(5) == seeds(5) and len(set(seeds(5))) == 3
    assert seeds(5) != seeds(6) and seeds(None) != seeds(None)
    assert all(0 <= seed < 2**63 for seed in seeds(None))


def test_no_request_asks_for_more_tokens_than_the_model_has_room_for(processor: InputProcessor) -> None:
    (prompt,) = processor.process_prompts([[1] * 35], SamplingParams(max_tokens=1000), "id")
    assert prompt.requests[0].params.max_tokens == 5


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        (["a", ""], PARAMS, r"prompts\[1\]"),
        ([[]], PARAMS, "prompts"),
        ([[1] * 40], PARAMS, "prompts='40 tokens'"),
        ([[257]], PARAMS, "prompts=257"),
        (["a"], SamplingParams(stop_token_ids=[300]), "stop_token_ids=300"),
        (["a"], SamplingParams(allowed_token_ids=[300]), "allowed_token_ids=300"),
        (["a"], SamplingParams(logit_bias={300: 1.0}), "logit_bias=300"),
        (
            ["a"],
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")),
            r"structured_outputs\.regex='\('",
        ),
    ],
)
def test_a_refusal_names_the_field(processor: InputProcessor, prompts: Any, params: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        processor.process_prompts(prompts, params, "id", name="prompts")


def test_a_text_of_ids_that_the_model_has_not_is_refused(tokenizer: Tokenizer) -> None:
    """A tokenizer may have more ids than the model's vocabulary: here its last one, 256 (BOS), and some bytes."""
    processor = InputProcessor(tokenizer, vocab_size=100, max_model_len=40)
    with pytest.raises(ConfigError, match=r"^prompts\[1\]=256: is out of vocabulary: .* within \[0, 100\)"):
        processor.process_prompts([[1], "a"], PARAMS, "id", name="prompts")


def test_bad_words_of_ids_that_the_model_has_not_are_left_to_the_sampler(tokenizer: Tokenizer) -> None:
    processor = InputProcessor(tokenizer, vocab_size=50, max_model_len=40)
    (prompt,) = processor.process_prompts([[1]], SamplingParams(bad_words=["xy"]), "id")
    assert prompt.requests[0].params.bad_words_token_ids


def test_a_refused_form_is_named_as_the_user_gave_it(processor: InputProcessor) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "odd"}))
    with pytest.raises(ConfigError, match="^response_format.json_schema="):
        processor.process_prompts(["a"], params, "id", structured_outputs_name="response_format.json_schema")


def test_bad_words_become_token_ids(processor: InputProcessor, tokenizer: Tokenizer) -> None:
    (prompt,) = processor.process_prompts(["a"], SamplingParams(bad_words=["xy"]), "id")
    assert prompt.requests[0].params.bad_words_token_ids == (tuple(tokenizer.encode("xy", add_special_tokens=False)),)


def test_bad_words_are_also_found_after_a_space_where_that_is_another_token() -> None:
    vocabulary = {"foo": [1], " foo": [2], "bar baz": [3, 4], " bar baz": [5, 4], "x": [6], " x": [7, 6]}
    assert bad_words_token_ids(["foo", " bar baz", "x"], vocabulary.__getitem__) == (
        (1,),
        (2,),
        (3, 4),
        (5, 4),
        (6,),
    )


def test_bad_words_are_tokenized_at_the_start_and_after_a_space() -> None:
    ids = {"ab": [1, 2], " ab": [3, 2], "c": [4], " c": [5, 4], "d": [6], " d": [6]}
    token_ids = bad_words_token_ids([" ab", "c", "d"], lambda text: ids[text])
    assert token_ids == ((1, 2), (3, 2), (4,), (6,))


def test_a_conversation_becomes_one_text_without_further_special_tokens(
    processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    prompt = processor.process_chat(ChatInput(messages=messages), PARAMS, "id")
    assert prompt.text == "<user>a\nb<assistant>Bonn<assistant>"
    assert prompt.token_ids == tokenizer.encode(prompt.text, add_special_tokens=False)
    assert prompt.make_tool_parser is None


@pytest.mark.parametrize("arguments", ["no JSON", "[" * 100_000, 5, None])
def test_arguments_that_are_no_json_are_left_to_the_template(processor: InputProcessor, arguments: Any) -> None:
    call = {"function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "x", "tool_calls": [call]}]
    assert processor.process_chat(ChatInput(messages=messages), PARAMS, "id").text == "<assistant>x<assistant>"


def test_variables_of_the_request_reach_the_template_and_win(processor: InputProcessor) -> None:
    variables = {"mood": "!", "add_generation_prompt": False}
    prompt = processor.process_chat(ChatInput(messages=USER, template_variables=variables), PARAMS, "id")
    assert prompt.text == "<user>Hi!"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": 5}, r"messages\[0\]\.content=5"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"messages\[0\]\.content\[0\]="),
        ({"role": "user", "content": ["a"]}, r"messages\[0\]\.content\[0\]='a'"),
        ({"role": "assistant", "content": "", "tool_calls": 5}, r"messages\[0\]\.tool_calls=5"),
    ],
)
def test_a_bad_message_is_named(processor: InputProcessor, message: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        processor.process_chat(ChatInput(messages=[message]), PARAMS, "id")


@pytest.mark.parametrize(
    ("choice", "parser"),
    [
        ("auto", HermesParser),
        ("required", ObjectsParser),
        ({"type": "function", "function": {"name": "weather"}}, NamedParser),
    ],
)
def test_the_choice_of_tools_decides_who_finds_calls_and_what_form_the_answer_has(
    processor: InputProcessor, choice: Any, parser: type
) -> None:
    prompt = processor.process_chat(ChatInput(messages=USER, tools=TOOLS, tool_choice=choice), PARAMS, "id")
    assert prompt.text is not None and prompt.text.startswith("[weather]")
    assert prompt.make_tool_parser is not None and isinstance(prompt.make_tool_parser(), parser)
    form = prompt.requests[0].params.structured_outputs
    assert (form is None) == (choice == "auto")


def test_without_a_choice_the_model_is_shown_the_tools_and_its_answer_left_alone(processor: InputProcessor) -> None:
    prompt = processor.process_chat(ChatInput(messages=USER, tools=TOOLS), PARAMS, "id")
    assert prompt.text == "[weather]<user>Hi<assistant>" and prompt.make_tool_parser is None
    hidden = processor.process_chat(ChatInput(messages=USER, tools=TOOLS, tool_choice="none"), PARAMS, "id")
    assert hidden.text == "<user>Hi<assistant>"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"tools": TOOLS * 2}, "tools=.*same name"),
        ({"tool_choice": "required"}, "tool_choice='required': needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice='now'"),
    ],
)
def test_a_bad_use_of_tools_is_named(processor: InputProcessor, fields: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        processor.process_chat(ChatInput(**{"messages": USER, **fields}), PARAMS, "id")


def test_a_forced_call_leaves_no_room_for_another_form(processor: InputProcessor) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ConfigError, match="^tool_choice='required'"):
        processor.process_chat(ChatInput(messages=USER, tools=TOOLS, tool_choice="required"), params, "id")


def test_embeddings_need_no_room_for_an_answer(processor: InputProcessor) -> None:
    requests = processor.process_embeddings([[1] * 40, "ab"], PoolingParams(pooling="mean"), "id")
    assert [request.request_id for request in requests] == ["id-0", "id-1"]
    assert requests[0].params.pooling == PoolingParams(pooling="mean")
    with pytest.raises(PromptTooLong, match=r"^input\[0\]='41 tokens'"):
        processor.process_embeddings([[1] * 41, "ab"], PoolingParams(), "id")

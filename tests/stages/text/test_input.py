"""From what users write to the requests that a lane takes."""

from __future__ import annotations

from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams
from stagemesh.config.sampling import SamplingParams, StructuredOutputsParams
from stagemesh.stages.text.input import ChatInput, InputProcessor, PromptTooLong, bad_words_token_ids
from stagemesh.stages.text.tokenizer import Tokenizer
from stagemesh.stages.text.tool_calls import NamedParser
from stagemesh.stages.text.tool_formats import Hermes, ListedCalls

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
        ("auto", Hermes),
        ("required", ListedCalls),
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


# ---- tools for templates of all kinds

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
NAMED = {"type": "function", "function": {"name": "weather"}}


def allowed_tools(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def processor_of(tokenizer: Tokenizer, template: Any, **options: Any) -> InputProcessor:
    tokenizer = Tokenizer(tokenizer._backend, chat_template=template)
    return InputProcessor(tokenizer, vocab_size=257, max_model_len=4000, seed=5, **options)


def found(prompt: Any, text: str) -> list[str | None]:
    parser = prompt.make_tool_parser()
    return [call.name for call in parser.feed(text).calls]


def test_tools_are_described_in_words_where_the_template_knows_none(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "tool", "content": "warm", "tool_call_id": "2"},
    ]
    chat = ChatInput(messages=messages, tools=TOOLS, tool_choice="auto")
    prompt = processor_of(tokenizer, PLAIN).process_chat(chat, PARAMS, "id")
    system, said = (prompt.text or "").split("<user>", 1)
    assert system.startswith("<system>Be brief.\n\n") and '{"name": "weather"' in system and "<tool_call>" in system
    in_words = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    results = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
    assert said == f"Hi<assistant>I look.\n{in_words}<user>{results}<assistant>"
    assert found(prompt, in_words) == ["weather"]


def test_the_description_goes_to_the_user_where_the_template_refuses_a_system_message(tokenizer: Tokenizer) -> None:
    chat = ChatInput(messages=USER, tools=TOOLS, tool_choice="auto")
    text = processor_of(tokenizer, NO_SYSTEM).process_chat(chat, PARAMS, "id").text or ""
    assert text.startswith("<user>You can call") and text.endswith("\n\nHi<assistant>")


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_are_described_without_a_form(tokenizer: Tokenizer, choice: Any) -> None:
    chat = ChatInput(messages=USER, tools=TOOLS, tool_choice=choice)
    prompt = processor_of(tokenizer, PLAIN).process_chat(chat, PARAMS, "id")
    assert '{"name": "weather"' in (prompt.text or "") and "<tool_call>" not in (prompt.text or "")
    assert prompt.requests[0].params.structured_outputs is not None


def test_the_templates_variant_for_tools_is_used_with_tools(tokenizer: Tokenizer) -> None:
    processor = processor_of(tokenizer, {"default": PLAIN, "tool_use": "{{ tools | length }} [TOOL_CALLS]"})
    chat = ChatInput(messages=USER, tools=TOOLS, tool_choice="auto")
    prompt = processor.process_chat(chat, PARAMS, "id")
    assert prompt.text == "1 [TOOL_CALLS]" and found(prompt, '[TOOL_CALLS]weather{"city": 1}') == ["weather"]
    assert "[TOOL_CALLS]" in prompt.shown_special_tokens
    assert processor.process_chat(ChatInput(messages=USER), PARAMS, "id").text == "<user>Hi<assistant>"


def test_a_named_parser_wins_over_the_templates_format(tokenizer: Tokenizer) -> None:
    chat = ChatInput(messages=USER, tools=TOOLS, tool_choice="auto")
    template = "{{ tools }} <tool_call>"
    prompt = processor_of(tokenizer, template, tool_call_parser="llama3_json").process_chat(chat, PARAMS, "id")
    assert found(prompt, '{"name": "weather", "parameters": {"city": 1}}') == ["weather"]
    with pytest.raises(ConfigError, match="^tool_call_parser='odd'"):
        processor_of(tokenizer, template, tool_call_parser="odd")


def test_allowed_tools_are_the_only_ones(processor: InputProcessor) -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "now"}}]
    chat = ChatInput(messages=USER, tools=tools, tool_choice=allowed_tools("auto", "now"))
    prompt = processor.process_chat(chat, PARAMS, "id")
    assert prompt.text == "[now]<user>Hi<assistant>"
    said = '<tool_call>{"name": "weather", "arguments": {"city": 1}}</tool_call><tool_call>{"name": "now"}</tool_call>'
    assert found(prompt, said) == ["now"]
    chat = ChatInput(messages=USER, tools=tools, tool_choice=allowed_tools("required", "now"))
    form = processor.process_chat(chat, PARAMS, "id").requests[0].params.structured_outputs
    assert form is not None and "now" in form.json_schema and "weather" not in form.json_schema


@pytest.mark.parametrize(
    "choice",
    [
        allowed_tools("auto", "odd"),
        allowed_tools("none", "weather"),
        allowed_tools("auto"),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [5]}},
    ],
)
def test_wrong_allowed_tools_are_named(processor: InputProcessor, choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tool_choice\.allowed_tools="):
        processor.process_chat(ChatInput(messages=USER, tools=TOOLS, tool_choice=choice), PARAMS, "id")


# ---- reasoning

FORM = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(json=SCHEMA))


@pytest.mark.parametrize(
    ("parser", "end", "variables", "after"),
    [
        ("qwen3", "<think>", {}, (None, "</think>")),
        ("qwen3", "<think></think>", {}, None),
        ("qwen3", "", {"enable_thinking": False}, None),
        ("qwen3", "", {}, None),  # the mark is no single token here
        ("deepseek_r1", "", {}, (None, "</think>")),
        (None, "<think>", {}, None),
    ],
)
def test_the_form_of_an_answer_begins_behind_its_reasoning(
    tokenizer: Tokenizer, parser: str | None, end: str, variables: Any, after: Any
) -> None:
    chat = ChatInput(messages=USER, template_variables=variables)
    prompt = processor_of(tokenizer, PLAIN + end, reasoning_parser=parser).process_chat(chat, FORM, "id")
    assert prompt.requests[0].params.structured_outputs_after == after


def test_where_the_answer_may_open_reasoning_the_opening_token_is_named(tokenizer: Tokenizer) -> None:
    processor = processor_of(tokenizer, PLAIN, reasoning_parser="qwen3")
    tokenizer._backend.add_tokens(["<think>"])
    mark = tokenizer._backend.token_to_id("<think>")
    prompt = processor.process_chat(ChatInput(messages=USER), FORM, "id")
    assert prompt.requests[0].params.structured_outputs_after == (mark, "</think>")

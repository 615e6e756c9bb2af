from __future__ import annotations

import asyncio
import random
import threading
from contextlib import aclosing
from typing import Any

import pytest

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.ingress.errors import UnknownModel
from stagemesh.deployments.ingress.service import GenerationStream, InferenceService
from stagemesh.deployments.openai.requests import ChatRequest, CompletionRequest
from stagemesh.stages.messages.request import LaneError, TokenDelta
from stagemesh.stages.text.input import PromptTooLong
from stagemesh.stages.text.output import TextDelta

pytestmark = pytest.mark.anyio


async def complete(service: InferenceService, **fields: Any) -> GenerationStream:
    return await service.complete(CompletionRequest.parse({"prompt": "Hi", "max_tokens": 30} | fields))


async def chat(service: InferenceService, **fields: Any) -> GenerationStream:
    messages = [{"role": "user", "content": "Hi"}]
    return await service.chat(ChatRequest.parse({"messages": messages} | fields))


async def deltas_of(generation: GenerationStream) -> list[TextDelta]:
    async with aclosing(generation.deltas()) as deltas:
        return [delta async for delta in deltas]


# ---- what reaches the lanes


async def test_a_text_prompt_is_tokenized_with_special_tokens(service, lanes, tokenizer):
    await (await complete(service, prompt="Hello")).collect()
    assert lanes.calls[0][0] == tokenizer.encode("Hello")
    await (await complete(service, prompt="Hello", add_special_tokens=False)).collect()
    assert lanes.calls[1][0] == tokenizer.encode("Hello")[1:]


async def test_token_ids_are_taken_as_they_are(service, lanes):
    await (await complete(service, prompt=[5, 6, 7])).collect()
    assert lanes.calls[0][0] == [5, 6, 7]


async def test_a_conversation_goes_through_the_chat_template(service, lanes, tokenizer):
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    generation = await chat(
        service, messages=[{"role": "user", "content": content}], chat_template_kwargs={"prefill": "So"}
    )
    await generation.collect()
    assert lanes.calls[0][0] == tokenizer.encode("<|user|>a\nb<|end|><|assistant|>So", add_special_tokens=False)


async def test_sampling_fields_are_handed_on(service, lanes):
    fields = {
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "ignore_eos": True,
        "stop": "x",
        "stop_token_ids": [3],
        "seed": 11,
    }
    await (await complete(service, **fields)).collect()
    params = lanes.calls[0][1]
    assert {name: getattr(params, name) for name in fields} == fields | {
        "stop": ("x",),
        "stop_token_ids": (3,),
    }


async def test_defaults_of_the_model_apply_where_the_request_is_silent(lanes, tokenizer):
    service = InferenceService(
        lanes=lanes,
        tokenizer=tokenizer,
        model_names=["tiny"],
        max_model_len=64,
        vocab_size=300,
        sampling_defaults={"temperature": 0.6, "top_k": 20},
    )
    await (await complete(service, top_k=5, temperature=None)).collect()
    assert (lanes.calls[0][1].temperature, lanes.calls[0][1].top_k) == (0.6, 5)


async def test_the_models_own_max_tokens_holds_for_chat_and_never_for_more_than_fits(lanes, tokenizer):
    fields = {"lanes": lanes, "tokenizer": tokenizer, "model_names": ["tiny"], "vocab_size": 300}
    service = InferenceService(max_model_len=64, sampling_defaults={"max_tokens": 5}, **fields)
    await (await chat(service)).collect()
    await (await chat(service, max_tokens=9)).collect()
    await (await complete(service, max_tokens=None)).collect()
    service = InferenceService(max_model_len=64, sampling_defaults={"max_tokens": 2048}, **fields)
    await (await chat(service)).collect()
    limits = [params.max_tokens for _, params, _ in lanes.calls]
    assert limits == [5, 9, 16, 64 - len(lanes.calls[3][0])]


async def test_max_tokens_is_16_for_completions_and_all_that_fits_for_chat(service, lanes):
    await (await complete(service, max_tokens=None)).collect()
    await (await chat(service)).collect()
    await (await chat(service, max_tokens=9, max_completion_tokens=3)).collect()
    await (await complete(service, max_tokens=1000)).collect()
    limits = [params.max_tokens for _, params, _ in lanes.calls]
    assert limits == [16, 64 - len(lanes.calls[1][0]), 3, 64 - len(lanes.calls[3][0])]


async def test_choices_count_the_seed_up_within_int64(service, lanes):
    await (await complete(service, n=3, seed=2**63 - 2)).collect()
    await (await complete(service, seed=-(2**63))).collect()
    assert [params.seed for _, params, _ in lanes.calls] == [2**63 - 2, 2**63 - 1, 0, 0]


async def test_a_seed_of_minus_one_is_none(service, lanes):
    await (await complete(service, n=2, seed=-1)).collect()
    seeds = [params.seed for _, params, _ in lanes.calls]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**53 for seed in seeds)


async def test_without_a_seed_every_choice_draws_its_own(service, lanes):
    await (await complete(service, n=4)).collect()
    seeds = {params.seed for _, params, _ in lanes.calls}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_the_seed_of_a_service_fixes_those_that_requests_get(lanes, tokenizer, backend):
    for _ in range(2):
        size = {"max_model_len": 64, "vocab_size": backend.get_vocab_size()}
        service = InferenceService(lanes=lanes, tokenizer=tokenizer, model_names=["tiny"], seed=5, **size)
        await (await complete(service, n=2)).collect()
    seeds = [params.seed for _, params, _ in lanes.calls]
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


async def test_prompts_and_choices_are_numbered_prompt_by_prompt(service, lanes):
    generation = await complete(service, prompt=["Hi", "Yo"], n=2)
    await generation.collect()
    prompts = {request_id.rpartition("-")[2]: prompt for prompt, _, request_id in lanes.calls}
    assert prompts["0"] == prompts["1"] != prompts["2"] == prompts["3"]


# ---- text and usage


async def test_text_comes_piece_by_piece_and_ends_with_the_reason(service, lanes):
    deltas = await deltas_of(await complete(service))
    assert "".join(delta.text for delta in deltas) == lanes.answer
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert len(deltas) > 2


async def test_usage_counts_every_token_the_end_token_included(service, lanes, tokenizer):
    lanes.num_cached_tokens = 2
    generation = await complete(service, prompt="Hello, Hello", n=2)
    await generation.collect()
    usage = generation.usage
    answer_tokens = len(tokenizer.encode(lanes.answer, add_special_tokens=False)) + 1
    assert usage.prompt_tokens == len(tokenizer.encode("Hello, Hello"))
    assert usage.completion_tokens == 2 * answer_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 2


async def test_cached_tokens_of_several_prompts_add_up(service, lanes):
    lanes.num_cached_tokens = 1
    generation = await complete(service, prompt=["Hello", "world"], n=3)
    await generation.collect()
    assert generation.usage.prompt_tokens_details.cached_tokens == 2


async def test_the_length_limit_ends_with_length(service, lanes):
    generation = await complete(service, max_tokens=1)
    [text] = await generation.collect()
    assert lanes.answer.startswith(text)
    assert generation.choices[0].finish_reason == "length"
    assert generation.usage.completion_tokens == 1


async def test_a_stop_string_is_cut_off_and_the_lane_is_released(service, lanes, tokenizer):
    generation = await complete(service, stop=["o, w", "zzz"])
    assert await generation.collect() == ["Hell"]
    assert generation.choices[0].finish_reason == "stop"
    assert lanes.aborted == [lanes.calls[0][2]]
    token_ids = tokenizer.encode(lanes.answer, add_special_tokens=False)
    needed = next(n for n in range(len(token_ids) + 1) if "o, w" in tokenizer.decode(token_ids[:n]))
    assert generation.usage.completion_tokens == needed


async def test_a_stop_string_inside_one_big_delta_counts_only_the_tokens_up_to_it(service, lanes, tokenizer):
    token_ids = tokenizer.encode("abcdef", add_special_tokens=False)
    assert len(token_ids) == 6
    lanes.deltas = [TokenDelta("", 0, token_ids, finish_reason="length")]
    generation = await complete(service, stop="cd")
    assert await generation.collect() == ["ab"]
    assert generation.usage.completion_tokens == 4
    assert generation.choices[0].finish_reason == "stop"


async def test_stop_strings_wait_for_min_tokens(service, lanes, tokenizer):
    lanes.answer = "abcabc"
    assert await (await complete(service, stop="b")).collect() == ["a"]
    assert await (await complete(service, stop="b", min_tokens=3)).collect() == ["abca"]


async def test_text_held_back_for_a_stop_string_is_given_out_at_the_end(service, lanes):
    assert await (await complete(service, stop="world!")).collect() == [lanes.answer]


async def test_a_stop_token_is_counted_and_not_shown(service, lanes, tokenizer):
    token_ids = tokenizer.encode("abc", add_special_tokens=False)
    lanes.deltas = [TokenDelta("", 0, token_ids, finish_reason="stop", stop_token_id=token_ids[-1])]
    generation = await complete(service, stop_token_ids=[token_ids[-1]])
    assert await generation.collect() == ["ab"]
    assert generation.usage.completion_tokens == 3


async def test_special_tokens_are_shown_when_asked(service, lanes, tokenizer):
    lanes.answer = "a<|user|>b"
    assert await (await complete(service)).collect() == ["ab"]
    assert await (await complete(service, skip_special_tokens=False)).collect() == ["a<|user|>b"]


async def test_a_character_split_over_tokens_is_never_shown_in_part(service, lanes):
    lanes.answer = "a🙂é"
    deltas = await deltas_of(await complete(service))
    assert "".join(delta.text for delta in deltas) == "a🙂é"
    assert not any("�" in delta.text for delta in deltas)


async def test_the_text_is_the_same_however_the_tokens_are_packed(service, lanes, tokenizer):
    rng = random.Random(0)
    token_ids = [rng.randrange(5, 290) for _ in range(60)]
    text = tokenizer.decode(token_ids)
    for _ in range(20):
        cuts = sorted({0, 60, *rng.sample(range(60), 8)})
        lanes.deltas = [
            TokenDelta("", a, token_ids[a:b], "length" if b == 60 else None)
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        for stop in ([], ["no such text"]):
            assert await (await complete(service, stop=stop)).collect() == [text]


async def test_choices_are_interleaved_as_they_come(service, lanes):
    deltas = await deltas_of(await complete(service, n=3))
    texts = ["".join(p.text for p in deltas if p.index == i) for i in range(3)]
    assert texts == [lanes.answer] * 3
    assert [p.index for p in deltas][:3] == [0, 1, 2]


# ---- what goes wrong on the way


@pytest.mark.parametrize("offset", [0, 2])
async def test_a_gap_or_an_overlap_of_tokens_is_an_error(service, lanes, offset):
    lanes.deltas = [TokenDelta("", 0, [70]), TokenDelta("", offset, [71])]
    with pytest.raises(LaneError, match=f"from {offset} on, 1 was next"):
        await (await complete(service)).collect()
    assert not lanes.running


async def test_an_answer_that_just_ends_is_an_error(service, lanes):
    lanes.deltas = [TokenDelta("", 0, [70])]
    with pytest.raises(LaneError) as caught:
        await (await complete(service)).collect()
    assert caught.value.status == "lost"


@pytest.mark.parametrize(("reason", "status"), [("error", "internal"), ("abort", "lost")])
async def test_a_lane_that_gives_up_is_an_error_and_no_answer(service, lanes, reason, status):
    lanes.deltas = [TokenDelta("", 0, [], finish_reason=reason, error="out of luck")]
    with pytest.raises(LaneError, match="out of luck") as caught:
        await (await complete(service)).collect()
    assert caught.value.status == status


async def test_one_failing_choice_ends_the_others(service, lanes):
    lanes.pause_after, lanes.error = 1, LaneError("lost", "gone")
    lanes.deltas = [TokenDelta("", 0, [70])]
    with pytest.raises(LaneError, match="gone"):
        await (await complete(service, n=3)).collect()
    assert not lanes.running


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_the_pieces_aborts_everything_that_still_runs(service, lanes, n):
    lanes.pause_after = 2
    deltas = (await complete(service, n=n)).deltas()
    await anext(deltas)
    assert len(lanes.running) == n
    await deltas.aclose()
    assert not lanes.running
    assert len(lanes.aborted) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_a_collection_aborts_everything_that_still_runs(service, lanes, n):
    lanes.pause_after = 0
    task = asyncio.create_task((await complete(service, n=n)).collect())
    while len(lanes.running) < n:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not lanes.running
    assert len(lanes.aborted) == n


async def test_metrics_tell_the_outcomes_apart(service, lanes):
    await (await complete(service)).collect()
    await (await complete(service, max_tokens=1)).collect()
    deltas = (await complete(service)).deltas()
    await anext(deltas)
    await deltas.aclose()
    lanes.lose()
    with pytest.raises(LaneError):
        await (await complete(service)).collect()
    text = service.metrics.render().decode()
    for reason in ("stop", "length", "abort", "error"):
        assert f'vllm:request_success_total{{finished_reason="{reason}",model_name="tiny"}} 1.0' in text
    assert 'vllm:time_to_first_token_seconds_count{model_name="tiny"} 3.0' in text
    assert 'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 2.0' in text


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["ok", ""]}, r"prompt\[1\]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt=-1"),
        ({"prompt": [10**6]}, "prompt=1000000"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        ({"max_tokens": "5.5"}, "max_tokens='5.5'"),
        ({"max_tokens": 5.5}, "max_tokens=5.5"),
        ({"min_tokens": 31}, "min_tokens=31"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 2}, "min_p=2"),
        ({"seed": 2**63}, "seed="),
        ({"seed": -(2**63) - 1}, "seed="),
        ({"top_k": 2**64}, "top_k="),
        ({"top_k": 2**31}, "top_k="),
        ({"max_tokens": 10**400}, "max_tokens="),
        ({"n": 0}, "n=0"),
        ({"n": 1000}, "n=1000"),
        ({"prompt": ["a"] * 513, "n": 2}, "prompt=513"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 5]}, r"stop\[1\]=5"),
        ({"stop": ["a"] * 17}, "stop=17"),
        ({"stop": "a" * 257}, "stop="),
        ({"stop_token_ids": [300000]}, "stop_token_ids=300000"),
        ({"stream": "perhaps"}, "stream='perhaps'"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"logprob_token_ids": [1]}, r"logprob_token_ids=\[1\]"),
        ({"logprob_token_ids": [300000], "logprobs": 1}, "logprob_token_ids=300000: is out of vocabulary"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs=1"),
        ({"use_beam_search": True}, "use_beam_search=True"),
        ({"suffix": "end"}, "suffix='end'"),
        ({"guided_json": {}}, "guided_json"),
        ({"best_of": 3, "n": 2}, "best_of=3"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2"),
        ({"truncate_prompt_tokens": 65}, "truncate_prompt_tokens=65"),
        ({"truncate_prompt_tokens": 0}, r"prompt=\[\]: has no tokens"),
        ({"cache_salt": ""}, "cache_salt=''"),
        ({"frequency_penalty": 2.5}, "frequency_penalty=2.5"),
        ({"presence_penalty": -2.5}, "presence_penalty=-2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"logit_bias": {"x": 1}}, "logit_bias='x'"),
        ({"logit_bias": {"300000": 1}}, "logit_bias=300000"),
        ({"allowed_token_ids": [300000]}, "allowed_token_ids=300000"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["a"] * 129}, "bad_words=129"),
        ({"response_format": {"type": "xml"}}, "response_format.type='xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
            "response_format.json_schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, r"structured_outputs\.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format='json_object'",
        ),
        ({"n": 0, "best_of": 3, "stop": ["a"] * 17}, "n=0: .*; best_of=3: .*; stop=17: "),
        ({"n": "x", "seed": "y", "stop": 5}, "seed='y': .*; stop=5: .*; n='x': "),
    ],
)
async def test_a_bad_field_is_named(service, lanes, fields, named):
    with pytest.raises(ConfigError, match=f"^{named}".replace("?", r"\?")):
        await complete(service, **fields)
    assert not lanes.calls


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role=None: is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"messages\[0\].content\[0\].type='image_url'",
        ),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages.*no judges"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 5}]}, r"messages\[0\].tool_calls=5"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [5]}]}, r"messages\[0\].tool_calls=\[5\]"),
        ({"max_completion_tokens": -1}, "max_completion_tokens=-1"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice='required': needs tools"),
        ({"top_logprobs": 2}, "top_logprobs=2: needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs=21"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message=True"),
        ({"chat_template": "{{ 1 }}"}, "chat_template='{{ 1 }}': is not taken from requests"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template='x': is not taken from requests"),
        ({"chat_template_kwargs": {"chat_template": 5}}, "chat_template_kwargs.chat_template=5"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type='structural_tag': needs"),
        ({"reasoning_effort": "huge"}, "reasoning_effort='huge'"),
    ],
)
async def test_a_bad_chat_field_is_named(service, lanes, fields, named):
    with pytest.raises(ConfigError, match=f"^{named}"):
        await chat(service, **fields)
    assert not lanes.calls


async def test_neutral_values_of_unsupported_fields_are_accepted(service):
    await complete(service, logprobs=None, echo=False, best_of=1, frequency_penalty=0.0, logit_bias={}, user="me")
    await chat(
        service,
        tools=None,
        tool_choice="auto",
        response_format={"type": "text"},
        logprobs=False,
        metadata={"a": "b"},
    )


async def test_a_prompt_that_is_too_long_names_both_numbers(service):
    with pytest.raises(PromptTooLong, match="64 tokens': this model's maximum context length is 64 tokens"):
        await complete(service, prompt=[7] * 64)
    assert (await complete(service, prompt=[7] * 63)).choices[0].request.params.max_tokens == 1


async def test_a_long_text_is_tokenized_too(service):
    with pytest.raises(PromptTooLong, match="801 tokens"):
        await complete(service, prompt="z" * 800)


async def test_a_text_too_long_for_any_tokenization_is_not_tokenized(service, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", None)
    with pytest.raises(PromptTooLong, match="20000 characters"):
        await complete(service, prompt="z" * 20_000)


async def test_many_texts_that_are_long_together_leave_the_event_loop_alone(service, tokenizer, monkeypatch):
    encode, threads = tokenizer.encode, set()

    def spy(text: str, **options: Any) -> list[int]:
        threads.add(threading.current_thread())
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", spy)
    await complete(service, prompt=["Hello"] * 4)
    assert threads == {threading.main_thread()}
    threads.clear()
    with pytest.raises(PromptTooLong, match=r"prompt\[0\]"):
        await complete(service, prompt=["x" * 800] * 40)
    assert threads and threading.main_thread() not in threads


async def test_an_unknown_model_is_told_what_is_served(service):
    with pytest.raises(UnknownModel, match="served: tiny, alias"):
        await complete(service, model="gpt-4")
    assert (await complete(service, model="alias")).model == "alias"
    assert (await complete(service)).model == "tiny"

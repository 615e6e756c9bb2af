"""The calls of `LLM` beside `generate`, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from support.harness import DEMO
from transformers import AutoTokenizer

from stagemesh import LLM, BeamSearchParams, SamplingParams
from stagemesh.config.errors import ConfigError
from stagemesh.deployments.offline import llm as llm_module

ARGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 32}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
CONVERSATION = [
    {"role": "user", "content": "What is 40+2?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "What is 17+25?"},
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(DEMO), **ARGS) as llm:
        yield llm


def test_the_tokenizer_answers_as_that_of_transformers(llm: LLM) -> None:
    ours, theirs = llm.get_tokenizer(), AutoTokenizer.from_pretrained(str(DEMO))
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "is_fast"):
        assert getattr(ours, name) == getattr(theirs, name), name
        if name.endswith("_token"):
            assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id"), name
    assert (len(ours), ours.vocab_size, ours.get_vocab()) == (len(theirs), theirs.vocab_size, theirs.get_vocab())
    assert ours.all_special_ids == sorted(theirs.all_special_ids)
    for text in ("Hello, König!", " two  spaces ", "<|user|>What is 17+25?<|eos|>"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
    assert ours.decode(ids[1]) == theirs.decode(ids[1]) and ours(["a", "b c"]) == dict(theirs(["a", "b c"]))
    assert ours.convert_tokens_to_ids(["<|eos|>", "no such"]) == theirs.convert_tokens_to_ids(["<|eos|>", "no such"])
    for options in ({}, {"add_generation_prompt": True}, {"tokenize": False}, {"chat_template": "{{ messages }}"}):
        for conversation in (CONVERSATION, [CONVERSATION, CONVERSATION[:1]]):
            expected = theirs.apply_chat_template(conversation, return_dict=False, **options)
            assert ours.apply_chat_template(conversation, **options) == expected, options
    assert ours.apply_chat_template(CONVERSATION, return_dict=True)["attention_mask"][0] == 1
    with pytest.raises(AttributeError, match="no attribute 'eos_tokens'"):
        _ = ours.eos_tokens


def test_a_chat_goes_on_behind_its_last_message(llm: LLM) -> None:
    messages = [CONVERSATION[2], {"role": "assistant", "content": "4"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "use_tqdm": False}
    output = llm.chat(messages, GREEDY, continue_final_message=True, **options)[0]
    assert output.prompt is not None and output.prompt.endswith("<|assistant|>4")
    ids = llm.get_tokenizer().encode(output.prompt, add_special_tokens=False)
    assert output.outputs[0].text == llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0].text
    with pytest.raises(ConfigError, match="continue_final_message"):
        llm.chat(messages, GREEDY, continue_final_message=True)
    with pytest.raises(ConfigError, match="does not write the last message's content"):
        llm.chat(messages, GREEDY, continue_final_message=True, chat_template="no", **options)


def test_a_chat_has_the_template_and_the_variables_that_it_is_given(llm: LLM) -> None:
    template = "{{ mood }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    output = llm.chat(
        CONVERSATION, GREEDY, False, chat_template=template, tools=tools, chat_template_kwargs={"mood": "merry"}
    )[0]
    assert output.prompt == "merrylookWhat is 40+2?"


def test_beams_are_the_likeliest_continuations(llm: LLM) -> None:
    greedy = llm.generate("The king said", SamplingParams(temperature=0.0, max_tokens=5, logprobs=1, ignore_eos=True))
    params = BeamSearchParams(beam_width=4, max_tokens=5, ignore_eos=True, length_penalty=0.0)
    found, same = llm.beam_search(["The king said", {"prompt_token_ids": greedy[0].prompt_token_ids}], params)
    assert [one.tokens for one in found.sequences] == [one.tokens for one in same.sequences]
    scores = [sequence.cum_logprob for sequence in found.sequences]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    likeliest = greedy[0].outputs[0].cumulative_logprob
    assert likeliest is not None and scores[0] >= likeliest - 1e-4
    for sequence in found.sequences:
        read = llm.generate(sequence.tokens, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0]
        assert read.prompt_logprobs is not None
        answer = zip(sequence.tokens[-5:], read.prompt_logprobs[-5:], strict=True)
        total = sum(entry[token].logprob for token, entry in answer if entry is not None)
        assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
        assert sequence.text == llm.get_tokenizer().decode(sequence.tokens) and sequence.finish_reason == "length"


def test_a_beam_ends_at_eos_and_at_the_end_of_the_model(llm: LLM) -> None:
    prompt = llm.get_tokenizer().apply_chat_template(CONVERSATION[2:], add_generation_prompt=True)
    (output,) = llm.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=24))
    best = output.sequences[0]
    assert llm.get_tokenizer().decode(best.tokens[len(prompt) :], skip_special_tokens=True) == "42"
    assert (best.finish_reason, best.stop_reason) == ("stop", llm.get_tokenizer().eos_token_id)
    (output,) = llm.beam_search([[5] * 255], BeamSearchParams(beam_width=2, max_tokens=24, ignore_eos=True))
    assert {len(sequence.tokens) for sequence in output.sequences} == {256}
    with pytest.raises(ConfigError, match=r"prompts\[1\]"):
        llm.beam_search([[5], [5] * 256], BeamSearchParams(beam_width=2, max_tokens=24))


@pytest.mark.parametrize("params", [{"beam_width": 0}, {"max_tokens": 0}, {"structured_outputs": {"regex": "a"}}])
def test_beam_parameters_are_checked_by_name(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(params))}="):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **params})


def test_texts_are_scored_in_pairs_or_one_against_all(llm: LLM) -> None:
    texts = ["The king said", "The queen said", "What is 17+25?"]
    one = [output.outputs.score for output in llm.score("The king said", texts, use_tqdm=False)]
    assert one[0] == pytest.approx(1, abs=1e-4) and one[0] > max(one[1:]) and min(one) >= -1
    pairs = llm.score(texts, texts[::-1], use_tqdm=False)
    assert [output.outputs.score for output in pairs] == pytest.approx([one[2], 1, one[2]], abs=1e-4)
    first, last = (llm.embed(text, use_tqdm=False)[0].outputs.embedding for text in (texts[0], texts[2]))
    assert one[2] == pytest.approx(sum(a * b for a, b in zip(first, last, strict=True)), abs=1e-4)
    with pytest.raises(ConfigError, match="data_1=2: must be one text, or as many as data_2 has"):
        llm.score(texts[:2], texts)


def test_what_needs_another_kind_of_model_is_refused(llm: LLM) -> None:
    for call in (llm.classify, llm.reward, lambda text: llm.encode(text, pooling_task="token_classify")):
        with pytest.raises(ConfigError, match="needs a model with a head for it"):
            call("Hello")


def test_changed_parameters_are_checked_before_anything_runs(llm: LLM) -> None:
    params = GREEDY.clone()
    params.max_tokens = 2
    assert len(llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 2
    params.temperature = -1
    with pytest.raises(ConfigError, match=r"temperature=-1: must be a number within \[0, 100\]"):
        llm.generate("Hello", params, use_tqdm=False)


def test_without_detokenizing_there_are_only_token_ids(llm: LLM) -> None:
    plain = llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0]
    params = GREEDY.clone()
    params.detokenize = False
    answer = llm.generate("Hello", params, use_tqdm=False)[0].outputs[0]
    assert (answer.token_ids, answer.text) == (plain.token_ids, "") and plain.text


def test_without_a_tokenizer_token_ids_go_in_and_come_out(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Hello")
    expected = llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0]
    with LLM(str(DEMO), skip_tokenizer_init=True, **ARGS) as bare:
        output = bare.generate({"prompt_token_ids": ids}, GREEDY)[0].outputs[0]
        assert (output.token_ids, output.text) == (expected.token_ids, "")
        for call in (
            lambda: bare.generate("Hello", GREEDY),
            lambda: bare.generate(ids, SamplingParams(stop=["a"])),
            lambda: bare.chat(CONVERSATION, GREEDY, chat_template="{{ messages }}"),
            bare.get_tokenizer,
        ):
            with pytest.raises(ConfigError, match="skip_tokenizer_init=True: leaves no tokenizer"):
                call()


def test_the_prefix_cache_is_not_forgotten_under_a_running_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "RESET_TIMEOUT_S", 0.0)
    resets = []

    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def update(self) -> None:
            resets.append(llm.reset_prefix_cache())

        def close(self) -> None: ...

    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 100)]
    llm.generate(["Hello"] * 2, params, use_tqdm=Bar)
    assert resets[0] is False
    monkeypatch.undo()
    assert llm.reset_prefix_cache()


def test_metrics_have_vllms_names_and_count(llm: LLM) -> None:
    def values() -> dict[str, Any]:
        metrics: list[Any] = llm.get_metrics()
        assert all(metric.labels == {"model_name": str(DEMO), "engine": "0"} for metric in metrics)
        return {metric.name: metric.value for metric in metrics}

    before = values()
    output = llm.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)[0]
    after = values()
    # An idle lane also answers a token now and then, to know that it is alive.
    assert after["vllm:prompt_tokens"] - before["vllm:prompt_tokens"] >= len(output.prompt_token_ids)
    assert after["vllm:generation_tokens"] - before["vllm:generation_tokens"] >= 3
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1


def test_the_bars_say_what_loads_and_how_fast_tokens_come(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["Hello"] * 2, GREEDY)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "est. speed input: " in shown and " toks/s, output: " in shown
    speed = float(shown.rsplit("output: ", 1)[1].split()[0])
    assert math.isfinite(speed) and speed > 0


def test_arguments_that_have_no_meaning_here_are_refused_by_name(llm: LLM) -> None:
    assert llm.generate("Hello", GREEDY, use_tqdm=False, lora_request=None)[0].finished
    unsupported: dict[str, Any] = {"lora_request": "adapter"}
    for call in (llm.generate, llm.chat):
        with pytest.raises(ConfigError, match="lora_request='adapter': is not supported"):
            call(CONVERSATION, GREEDY, **unsupported)  # type: ignore[operator]
    mistyped: dict[str, Any] = {"use_tdqm": None}
    with pytest.raises(TypeError, match="use_tdqm"):
        llm.generate("Hello", GREEDY, **mistyped)
    with pytest.raises(ConfigError, match="autoscaling_config.*is for a server"):
        LLM(str(DEMO), autoscaling_config={"max_replicas": 2}, **ARGS)

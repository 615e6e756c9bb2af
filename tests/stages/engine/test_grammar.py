"""Answers of a given form: they always have it, whatever the model would like to say and whatever happens."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from support.schemas import assert_valid, random_schema
from support.toy_lane import Answer, ToyLane, answer_alone
from tokenizers import decoders, models, pre_tokenizers, trainers

from stagemesh.config.errors import ConfigError
from stagemesh.config.sampling import MAX_CHOICES, SamplingParams, StructuredOutputsParams
from stagemesh.stages.engine.grammar import Grammar, GrammarFactory, check

EOS = 0
NUM_SCHEMAS = 200
PADDING = 20
"""Ids that the model has and the tokenizer has not."""


class Model:
    """A small byte-level tokenizer, and the toy model over its vocabulary."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = tokenizers.Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        words = '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true, "no": null, "maybe": false}'
        self.tokenizer.train_from_iterator([words] * 3, trainer)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        self.vocab_size = self.tokenizer.get_vocab_size() + PADDING
        self.grammars = GrammarFactory(folder, [EOS], self.vocab_size)

    def lane(self, **changes: Any) -> ToyLane:
        return ToyLane(self.vocab_size, eos_token_id=EOS, **changes)

    def grammar(self, **form: Any) -> Grammar:
        return self.grammars.make(StructuredOutputsParams(**form))

    def text(self, answer: Answer) -> str:
        assert answer.finish_reason == "stop" and answer.token_ids[-1] == EOS
        return str(self.tokenizer.decode(answer.token_ids))

    def answer(self, seed: int = 0, form: dict[str, Any] | None = None, **changes: Any) -> str:
        return self.text(answer_alone(self.lane(), [5, seed], params(seed, **changes), self.grammar(**(form or {}))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


def params(seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 400, "seed": seed} | changes))


@pytest.mark.parametrize(
    "num_blocks, loses_cache",
    [(4096, False), (52, False), (4096, True)],
    ids=["calm", "preempted", "cache lost now and then"],
)
def test_answers_to_random_schemas_always_validate(model: Model, num_blocks: int, loses_cache: bool) -> None:
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]
    lane = model.lane(num_blocks=num_blocks, max_num_batched_tokens=64)
    for i, schema in enumerate(schemas):
        changes = {"temperature": [0.0, 1.0, 3.0][i % 3], "max_tokens": 200}
        lane.add(str(i), [5, i % 50], params(i, **changes), model.grammar(json=schema))
    answers = lane.run(lambda step: lane.scheduler.preempt_all() if loses_cache and step % 11 == 10 else None)
    assert (lane.scheduler.stats().num_preemptions > 0) == (num_blocks == 52)
    for i, schema in enumerate(schemas):
        assert_valid(model.text(answers[str(i)]), schema)


def test_a_preempted_answer_is_the_undisturbed_one(model: Model) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string", "maxLength": 40}}, "required": ["s"]}
    calm = answer_alone(model.lane(), [5], params(1), model.grammar(json=schema))
    lane = model.lane()
    lane.add("a", [5], params(1), model.grammar(json=schema))
    disturbed = lane.run(lambda step: lane.scheduler.preempt_all() if step % 2 else None)["a"]
    assert disturbed == calm


def test_a_mask_depends_on_the_answer_and_not_on_what_was_asked_before(model: Model) -> None:
    form = {"regex": "(ab|cd){3}x"}
    token_ids = model.tokenizer.encode("abcdabx").ids
    by_one, at_once = model.grammar(**form), model.grammar(**form)
    masks = [by_one.mask(token_ids[:n]).tobytes() for n in range(len(token_ids) + 1)]
    for n in random.Random(0).choices(range(len(token_ids) + 1), k=30):
        assert at_once.mask(token_ids[:n]).tobytes() == masks[n]


def test_an_answer_matches_the_whole_regex(model: Model) -> None:
    for seed in range(10):
        assert re.fullmatch("[0-9]{3}-[a-f]{1,5}", model.answer(seed, {"regex": "[0-9]{3}-[a-f]{1,5}"}))


def test_an_answer_is_one_of_the_choices(model: Model) -> None:
    choices = ["yes", "no", 'may "be"', "größer"]
    answers = {model.answer(seed, {"choice": choices}, temperature=5.0) for seed in range(40)}
    assert answers == set(choices)


@pytest.mark.parametrize("grammar", ['start: "a" /b{1,4}/ "c"', 'root ::= "a" b "c"\nb ::= "b" | "bb"'])
def test_an_answer_follows_a_grammar_of_either_notation(model: Model, grammar: str) -> None:
    for seed in range(5):
        assert re.fullmatch("ab{1,4}c", model.answer(seed, {"grammar": grammar}))


def test_as_many_choices_as_may_be_given(model: Model) -> None:
    choices = [f"choice {i}" for i in range(MAX_CHOICES)]
    assert model.answer(0, {"choice": choices}) in choices


def test_json_object_gives_an_object(model: Model) -> None:
    # Nothing bounds this one but a bias towards what closes strings and objects.
    bias = {model.tokenizer.encode(text).ids[0]: 12.0 for text in ('"', "}", ":")}
    answer = model.answer(3, {"json_object": True}, logit_bias=bias)
    assert isinstance(json.loads(answer), dict)


def test_a_grammar_that_has_ended_ends_the_answer_before_min_tokens(model: Model) -> None:
    assert model.answer(0, {"choice": ["yes"]}, min_tokens=50) == "yes"


def test_a_grammar_is_obeyed_together_with_penalties_and_bias(model: Model) -> None:
    bias = dict.fromkeys(range(model.vocab_size), -100.0)
    text = model.answer(0, {"regex": "[ab]{20}"}, repetition_penalty=2.0, frequency_penalty=2.0, logit_bias=bias)
    assert re.fullmatch("[ab]{20}", text)


def test_min_tokens_keeps_a_grammar_that_may_go_on_from_ending(model: Model) -> None:
    text = model.answer(0, {"regex": "a*"}, min_tokens=12, logit_bias={EOS: 50.0})
    assert set(text) == {"a"} and len(text) >= 12


@pytest.mark.parametrize(
    "form",
    [
        {"json": "{"},
        {"json": {"type": "nonsense"}},
        {"regex": "("},
        {"grammar": "start: missing"},
        {"grammar": "root ::= (("},
    ],
)
def test_a_grammar_that_is_wrong_is_refused_by_name(model: Model, form: dict[str, Any]) -> None:
    for refuse in (check, model.grammars.make):
        with pytest.raises(ConfigError, match=rf"structured_outputs\.{next(iter(form))}"):
            refuse(StructuredOutputsParams(**form))


def chain_of_references(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": definitions | {f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "form",
    [
        {"grammar": "root ::= " + '"a"? ' * 20_000},
        {"regex": "a?" * 20_000},
        {"json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
        {"regex": "a" * 300_000},
        {"regex": "(" * 2000 + "a" + ")*" * 2000},
        {"choice": ["a" * 300_000, "b"]},
        {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
        {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
        {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"'},
        {"grammar": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(9000)) + 'r9000 ::= "a"'},
        {"grammar": "start: r0\n" + "".join(f"r{i}: ((((r{i + 1}))))\n" for i in range(998)) + 'r998: "a"'},
        {"json": json.dumps(chain_of_references(5000)).replace("$ref", "\\u0024ref")},
    ],
)
def test_a_grammar_too_large_or_too_deep_is_refused_by_name(model: Model, form: dict[str, Any]) -> None:
    for refuse in (check, model.grammars.make):
        with pytest.raises(ConfigError, match=rf"structured_outputs\.{next(iter(form))}"):
            refuse(StructuredOutputsParams(**form))


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "((a|a){1000}){1000}"},
        {"grammar": 'start: a{1000000}\na: "x"'},
    ],
)
def test_a_mask_that_would_take_too_long_is_an_error_of_its_grammar(model: Model, form: dict[str, Any]) -> None:
    grammar = model.grammar(**form)
    output: list[int] = []
    while not grammar.error:
        mask = np.unpackbits(grammar.mask(output), bitorder="little")
        output.append(int(np.flatnonzero(mask)[-1]))
        assert len(output) < 100
    assert "could not be kept to its form" in grammar.error and "<state>" not in grammar.error


def nested_object(num_properties: int) -> dict[str, Any]:
    address = {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}}}
    kinds = [{"type": "string", "maxLength": 200}, {"type": "integer"}, {"enum": ["a", "b", None]}, address]
    properties = {f"field_{i}": kinds[i % len(kinds)] for i in range(num_properties)}
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    "form",
    [
        {"json": nested_object(200)},
        {"json": {"anyOf": [nested_object(10) for _ in range(20)]}},
        {"json": {"$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"}},
        {"regex": r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"},
        {"regex": r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,255}\.[A-Za-z]{2,24}"},
        {"regex": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"},
        {"grammar": 'start: product (("+" | "-") product)*\nproduct: NUMBER (("*" | "/") NUMBER)*\nNUMBER: /[0-9]+/'},
        {"choice": [f"answer {i}" for i in range(10_000)]},
    ],
)
def test_what_people_ask_for_is_within_the_limits(model: Model, form: dict[str, Any]) -> None:
    check(StructuredOutputsParams(**form))
    grammar = model.grammar(**form)
    output: list[int] = []
    for _ in range(12):
        allowed = np.flatnonzero(np.unpackbits(grammar.mask(output), bitorder="little"))
        assert not grammar.error
        output.append(int(allowed[0]))


def test_eos_ids_that_the_model_has_not_leave_a_grammar_its_end(model: Model) -> None:
    grammars = GrammarFactory(model.folder, [-1, EOS, model.vocab_size + 5], model.vocab_size)
    grammar = grammars.make(StructuredOutputsParams(choice=["yes"]))
    mask = np.unpackbits(grammar.mask(model.tokenizer.encode("yes").ids), bitorder="little")
    assert np.flatnonzero(mask).tolist() == [EOS]


def test_a_grammar_that_breaks_ends_the_answer_with_an_error(model: Model) -> None:
    grammar = model.grammar(regex="[a-c]{8}")
    lane = model.lane()
    lane.add("a", [5], params(0), grammar)

    def disturb(step: int) -> None:
        if step == 3:  # as when the library meets a limit of its own
            grammar._matcher.consume_tokens(model.tokenizer.encode("x").ids)

    answer = lane.run(disturb)["a"]
    assert answer.finish_reason == "unsatisfiable"
    assert "could not be kept to its form" in answer.error


@pytest.mark.parametrize("form", [{}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": [""]}])
def test_exactly_one_form_is_asked_for(form: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="structured_outputs"):
        StructuredOutputsParams(**form)


def test_a_model_without_tokenizer_has_no_structured_outputs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer.json"):
        GrammarFactory(tmp_path, [EOS], 100).make(StructuredOutputsParams(regex="a"))


def test_json_is_written_on_one_line_without_wasted_blanks(model: Model) -> None:
    fields = {"a": {"const": 1}, "b": {"const": 2}}
    item = {"type": "object", "properties": fields, "required": ["a", "b"], "additionalProperties": False}
    schema = {"type": "array", "items": item, "minItems": 2, "maxItems": 2}
    assert model.answer(0, {"json": schema}) == '[{"a": 1, "b": 2}, {"a": 1, "b": 2}]'


# ---- reasoning comes first

END = "</think>"


def allows(mask: Any, token_id: int) -> bool:
    return token_id // 8 < len(mask) and bool(mask[token_id // 8] >> token_id % 8 & 1)


def test_the_form_holds_from_behind_the_reasoning_on_whatever_was_asked_before(model: Model) -> None:
    form = StructuredOutputsParams(choice=["yes"])
    encode = model.tokenizer.encode
    thought, said = encode("hm, </thin </think>").ids, encode("yes").ids
    grammar = model.grammars.make(form, (None, END))
    answer = [*thought, *said]
    masks = [grammar.mask(answer[:n]).tobytes() for n in range(len(answer) + 1)]
    for n in random.Random(0).choices(range(len(answer) + 1), k=30):
        assert grammar.mask(answer[:n]).tobytes() == masks[n]
        assert model.grammars.make(form, (None, END)).mask(answer[:n]).tobytes() == masks[n]
    for n in range(len(thought)):
        mask = grammar.mask(answer[:n])
        assert not allows(mask, EOS) and all(allows(mask, i) for i in range(model.vocab_size) if i != EOS)
    first = grammar.mask(thought)
    assert allows(first, said[0]) and not allows(first, encode("n").ids[0]) and not allows(first, EOS)
    assert allows(grammar.mask(answer), EOS)


def test_an_answer_that_may_think_first_either_does_or_has_its_form_at_once(model: Model) -> None:
    encode = model.tokenizer.encode
    opening, said = encode("n").ids[0], encode("yes").ids
    grammar = model.grammars.make(StructuredOutputsParams(choice=["yes"]), (opening, END))
    mask = grammar.mask([])
    assert allows(mask, opening) and allows(mask, said[0]) and not allows(mask, encode("x").ids[0])
    assert allows(grammar.mask(said), EOS)
    assert allows(grammar.mask([opening]), encode("x").ids[0])
    assert allows(grammar.mask([opening, *encode(END).ids, *said]), EOS)


def test_a_preempted_answer_that_thinks_first_is_the_undisturbed_one(model: Model) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string", "maxLength": 9}}, "required": ["s"]}
    form = StructuredOutputsParams(json=schema)

    def run(is_disturbed: bool) -> Answer:
        lane = model.lane()
        # The end of reasoning is a text of one letter here, so that a random model finds it.
        lane.add("a", [5], params(1), model.grammars.make(form, (None, "e")))
        return lane.run(lambda step: lane.scheduler.preempt_all() if is_disturbed and step % 2 else None)["a"]

    assert run(True) == run(False)
    _, _, said = model.text(run(False)).partition("e")
    assert json.loads(said[said.index("{") :]).keys() == {"s"}

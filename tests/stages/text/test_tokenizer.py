from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stagemesh.config.errors import ConfigError
from stagemesh.stages.text.detokenizer import StopStrings
from stagemesh.stages.text.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, 17+25=42. Ünïcödé 你好 🙂 " * 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS = {"__type": "AddedToken", "content": "<|bos|>", "lstrip": False, "normalized": False, "rstrip": False}
SPECIALS = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens(["<think>", "<two words>", "<｜二｜>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "fox", "▁你", "好"]
    backend = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_level().save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": BOS, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def stream(tokenizer: Tokenizer, token_ids: list[int], cuts: random.Random, **options: bool) -> list[str]:
    """The pieces of an answer whose tokens arrive one to three at a time."""
    detokenizer = tokenizer.detokenizer(**options)
    pieces, start = [], 0
    while start < len(token_ids):
        end = start + cuts.randint(1, 3)
        pieces.append(detokenizer.feed(token_ids[start:end]))
        start = end
    return [*pieces, detokenizer.finish()]


# ---- encoding


def test_encoding_adds_bos_only_when_asked(tokenizer: Tokenizer):
    assert tokenizer.encode("fox")[0] == 0
    assert tokenizer.encode("fox", add_special_tokens=False) == tokenizer.encode("fox")[1:]


def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_padding_and_truncation_of_the_training_run_are_dropped(tmp_path: Path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("fox dog fox")) in range(3, 15)


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_broken_settings_file_is_named(tmp_path: Path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


# ---- chat templates


def test_a_conversation_is_rendered_with_the_models_template(tokenizer: Tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a < b?"}]
    assert tokenizer.render_chat(messages) == ("<|bos|><|system|>be brief<|end|><|user|>a < b?<|end|><|assistant|>")
    assert tokenizer.render_chat(messages, {"add_generation_prompt": False}).endswith("<|end|>")


def test_a_message_that_the_template_refuses_names_the_reason(tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="messages.*unknown role judge"):
        tokenizer.render_chat([{"role": "judge", "content": "hm"}])


def test_a_template_that_trips_over_its_input_is_the_inputs_fault(tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="messages"):
        tokenizer.render_chat([{"content": "no role"}])


def test_a_model_without_a_template_says_so():
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer(byte_level()).render_chat([{"role": "user", "content": "hi"}])


def test_a_template_file_wins_over_the_settings(folder: Path, tmp_path: Path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_folder(tmp_path).render_chat([]) == "new"
    assert Tokenizer.from_folder(tmp_path, "given").render_chat([]) == "given"


@pytest.mark.parametrize("are_files", [False, True])
def test_of_several_named_templates_one_is_for_conversations_with_tools(tmp_path: Path, are_files: bool):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    named = {"tool_use": "T{{ tools }}", "default": "D", "rag": "{% broken"}
    if are_files:
        (tmp_path / "chat_template.jinja").write_text(named["default"])
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
    else:
        listed = [{"name": name, "template": template} for name, template in named.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.render_chat([]) == tokenizer.render_chat([], {"tools": []}) == "D"
    assert tokenizer.render_chat([], {"tools": [1]}) == "T[1]"


def test_a_template_that_does_not_compile_is_refused():
    with pytest.raises(ConfigError, match="chat_template"):
        Tokenizer(byte_level(), chat_template="{% for %}")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content | tojson }}", '"<ü>"'),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ 'Y' if strftime_now('%Y') | int > 2000 }}", "Y"),
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1).a }}{{ 'no tools' if not tools }}", "1no tools"),
        ("{{ enable_thinking }}", "False"),
    ],
)
def test_templates_find_the_helpers_they_expect(template: str, text: str):
    tokenizer = Tokenizer(byte_level(), chat_template=template)
    messages = [{"role": "user", "content": "<ü>"}] * 2
    assert tokenizer.render_chat(messages, {"enable_thinking": False}) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str):
    with pytest.raises(ConfigError):
        Tokenizer(byte_level(), chat_template=template).render_chat([{"role": "user", "content": "x"}])


def test_rendering_agrees_with_transformers(folder: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    messages = [{"role": "user", "content": "fox <b>\n"}, {"role": "assistant", "content": "\n dog"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == prompt
    assert ours.encode(prompt, add_special_tokens=False) == theirs.encode(prompt, add_special_tokens=False)


# ---- streaming text


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_streamed_random_tokens_equal_the_full_decode(seed: int, skip: bool):
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    cuts = random.Random(seed)
    token_ids = [cuts.randrange(backend.get_vocab_size() + 3) for _ in range(cuts.randint(0, 200))]
    pieces = stream(tokenizer, token_ids, cuts, skip_special_tokens=skip)
    assert "".join(pieces) == backend.decode(token_ids, skip_special_tokens=skip)


@given(text=st.text(), seed=st.integers(0, 9))
def test_streamed_text_is_the_text_and_never_holds_a_partial_character(text: str, seed: int):
    tokenizer = _TOKENIZER
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, token_ids, random.Random(seed), skip_special_tokens=False)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    if "�" not in text:
        assert "�" not in "".join(pieces)


_TOKENIZER = Tokenizer(byte_level())


def test_a_character_cut_off_by_the_end_becomes_one_replacement_character(tokenizer: Tokenizer):
    smile = [tokenizer.encode(c, add_special_tokens=False) for c in ["🙃"]][0]
    assert len(smile) > 1
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed(smile[:-1]) == ""
    assert detokenizer.finish() == "�"


def test_sentencepiece_tokens_stream_as_a_continuation_of_the_prompt():
    backend = sentencepiece()
    tokenizer = Tokenizer(backend)
    byte = {value: backend.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    the, fox = backend.token_to_id("▁the"), backend.token_to_id("fox")
    token_ids = [1, the, fox, *(byte[b] for b in "é🙂".encode()), the]
    assert "".join(stream(tokenizer, token_ids, random.Random(1))) == " thefoxé🙂 the"
    assert backend.decode(token_ids) == "thefoxé🙂 the"


# ---- stop strings


def first_complete_stop(text: str, stops: list[str]) -> str | None:
    """Reference: grow the text by one character until it ends with a stop string."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=6), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_cut_the_stream_exactly(pieces: list[str], stops: list[str]):
    matcher = StopStrings(stops)
    emitted = ""
    text = ""
    for piece in pieces:
        for char in piece:  # one at a time, as the reference looks at it
            text += char
            emitted += matcher.feed(char)
            cut = first_complete_stop(text, stops)
            assert text.startswith(emitted)
            assert (matcher.hit is None) == (cut is None)
            assert matcher.hit is None or text.startswith(emitted + matcher.hit)
            assert cut is None or emitted == cut
    if not matcher.hit:
        assert emitted + matcher.finish() == text


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=5), max_size=12),
    stop=st.text(alphabet="ab", min_size=1, max_size=5),
)
def test_a_stop_string_is_found_across_any_pieces(pieces: list[str], stop: str):
    matcher = StopStrings([stop])
    emitted = "".join(matcher.feed(piece) for piece in pieces) + matcher.finish()
    assert emitted == "".join(pieces).split(stop)[0]


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopStrings(["\n\nUser:"])
    assert [matcher.feed(piece) for piece in ["Hi", "!\n", "\nUs", "ed", "\n\n", "User", ": x"]] == [
        "Hi",
        "!",
        "",
        "\n\nUsed",
        "",
        "",
        "",
    ]
    assert matcher.hit
    assert matcher.finish() == ""


# ---- decoders whose tokens depend on their neighbours

WORDS = [
    "un",
    "##believ",
    "##able",
    "a",
    "|",
    "<pad>",
    "e</w>",
    "n</w>",
    "t",
    ".",
    "n't",
    "▁do",
    "#",
    "<0xE4>",
    "ü",
    "_x",
]
OTHER_DECODERS = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "WordPiece without cleanup": decoders.WordPiece(cleanup=False),
    "BPEDecoder": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "Metaspace": decoders.Metaspace(),
    "Sequence": decoders.Sequence([decoders.Replace("_", " "), decoders.WordPiece(), decoders.Strip(" ", 1, 0)]),
    "Fuse": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
}


@pytest.mark.parametrize("kind", OTHER_DECODERS)
@given(ids=st.lists(st.integers(0, len(WORDS) + 3)), seed=st.integers(0, 9), skip=st.booleans())
def test_any_other_decoder_streams_what_it_decodes_at_once(kind: str, ids: list[int], seed: int, skip: bool):
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    if OTHER_DECODERS[kind] is not None:
        backend.decoder = OTHER_DECODERS[kind]
    backend.add_special_tokens(["[SEP]", "[CLS]"])
    tokenizer = Tokenizer(backend)
    whole = backend.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, random.Random(seed), skip_special_tokens=skip)) == whole
    assert tokenizer.decode(ids, skip_special_tokens=skip) == whole


def test_the_text_of_another_decoder_comes_word_by_word():
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    detokenizer = Tokenizer(backend).detokenizer()
    assert [detokenizer.feed([i]) for i in (0, 1, 2, 16, 3, 9)] == ["un", "believ", "able", "", " a", "."]
    assert detokenizer.finish() == ""
    assert Tokenizer(backend).token_bytes(14) == "ü".encode()


def test_a_special_token_that_a_parser_needs_is_shown():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a<|end|>b<|user|>", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(shown=["<|end|>"])
    assert detokenizer.feed(ids) + detokenizer.finish() == "a<|end|>b"

"""Prompts with known answers: what the demo model is trained on and what it is measured on.

Every skill has a deterministic held-out part (about one case in ten) that training never asks about,
so accuracy on `held_out(...)` shows what the model learned rather than what it memorised.
This module needs only the standard library, so a test-suite can import it without torch.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

SKILLS = ("add", "subtract", "copy", "reverse", "lookup")


def _words(text: str) -> list[str]:
    return text.split()


# Two disjoint pools. The tokenizer gives each key (after a space) and each value one token of its own.
KEYS = _words(
    """
    amber anchor apple arrow basket beacon bottle branch bridge bronze bucket button candle canvas
    carpet castle cedar circle clover cobalt copper coral cotton crystal dragon eagle ember engine
    falcon feather fiddle forest fossil garden garnet ginger glacier granite hammer harbor hazel
    helmet indigo iron ivory jacket jasper kettle ladder lantern lemon lilac linen magnet maple
    marble meadow mirror needle nickel olive onyx orange orchid paddle paper pebble pencil pepper
    planet pocket quartz rabbit ribbon ruby saddle saffron salmon scarlet silver spider stable
    statue sugar temple thistle ticket tiger timber topaz tunnel turtle velvet violet walnut window
    """
)
VALUES = _words(
    """
    acorn album alpha autumn badge bagel bamboo banjo barley bishop blanket bonus butter cabin camel
    canoe cargo cherry cider comet cookie cousin cradle cricket dahlia daisy delta desert diamond
    donkey dozen easel echo elbow fable fabric famous fennel flute funnel gadget galaxy goblin
    gravel guitar hamlet harvest hockey honey igloo insect island jelly jigsaw jungle kitten lagoon
    laptop legend lizard lobster magpie mango mayor melon micro mitten monkey muffin napkin nectar
    noodle oasis ocean otter oyster panda parrot piano picnic pigeon pilot pirate potato puzzle
    radio raven river robot rocket salad season shadow siren socket spiral
    """
)

_SUBJECTS = _words("miller baker sailor teacher farmer painter doctor child neighbour stranger")
_ADJECTIVES = ["old", "young", "quiet", "busy", "tall", "tired", "cheerful", "careful"]
_VERBS = ["found", "carried", "watched", "followed", "remembered", "painted", "counted", "left"]
_OBJECTS = ["road", "market", "boat", "letter", "house", "horse", "hill", "table", "clock", "field"]
_ENDINGS = [
    "in the morning",
    "after dinner",
    "near the town",
    "before the rain",
    "with a friend",
    "again",
    "at night",
]

_CONSONANTS = "bcdfghklmnprstvz"
_VOWELS = "aeiou"

# Rough token counts, good enough to aim for a distance without loading a tokenizer.
_FACT_TOKENS = 6
_QUESTION_TOKENS = 8
_TOKENS_PER_WORD = 1.2

MAX_FACTS = 8
"""Most facts that a held-out look-up states; the rest of it is filler. Training also sees more of them."""


@dataclass(frozen=True)
class Example:
    """One user message and the exact reply expected to it."""

    prompt: str
    answer: str


def is_held_out(case: str) -> bool:
    """A case is named by what decides its answer, not by its phrasing."""
    return zlib.crc32(case.encode()) % 10 == 0


def held_out(skill: str, count: int, seed: int) -> list[Example]:
    """`count` examples of `skill` that training never asked about; the same for the same seed."""
    rng = random.Random(f"held-out {skill} {seed}")
    if skill == "lookup":
        # Step through the distances so that a small count still covers 20 to about 1000 tokens.
        return [lookup_example(rng, 20 + 980 * i // max(count - 1, 1)) for i in range(count)]
    return [_GENERATORS[skill](rng, True) for _ in range(count)]


def training_example(skill: str, rng: random.Random) -> Example:
    """One example of any skill but look-up (see `lookup_conversation`), never a held-out one."""
    return _GENERATORS[skill](rng, False)


def lookup_example(rng: random.Random, distance: int) -> Example:
    """A held-out look-up whose fact stands about `distance` tokens before the question."""
    asked = _facts(rng, 1, held=True)
    key, value = asked.popitem()
    facts = _facts(rng, rng.randint(0, MAX_FACTS - 1), held=False)
    facts.pop(key, None)
    density = rng.uniform(0.1, 0.7)
    before = _passage(rng, facts, rng.randint(0, 60), density)
    after = _passage(rng, facts, distance - _QUESTION_TOKENS, density)
    return Example(" ".join([*before, _fact(key, value), *after]) + "\n" + _question(key), value)


def lookup_conversation(rng: random.Random, tokens: int, filler: Callable[[], str] | None = None) -> list[Example]:
    """A passage with facts, then as many questions as fit into about `tokens` tokens.

    Half of the conversations have no filler and many questions: the more answers in a row, the sooner
    a model finds out that they can be looked up.
    """
    per_turn = _QUESTION_TOKENS + 5
    is_dense = rng.random() < 0.5
    questions = max(1, int(tokens * (0.5 if is_dense else rng.uniform(0.05, 0.3))) // per_turn)
    facts = _facts(rng, rng.randint(1, 24 if is_dense else 8), held=False)
    remaining = dict(facts)
    density = 1.0 if is_dense else rng.uniform(0.1, 0.7)
    passage = _passage(rng, remaining, tokens - questions * per_turn - 8, density, filler, restated=0.3)
    stated = [key for key in facts if key not in remaining]
    if not stated:
        stated.append(remaining.popitem()[0])
        passage.append(_fact(stated[0], facts[stated[0]]))
    asked = rng.choices(stated, k=questions)
    first = Example(" ".join(passage) + "\n" + _question(asked[0]), facts[asked[0]])
    return [first, *(Example(_question(key), facts[key]) for key in asked[1:])]


def filler_sentence(rng: random.Random) -> str:
    """A plain English sentence that has nothing to do with any question."""
    who = f"{rng.choice(_ADJECTIVES)} {rng.choice(_SUBJECTS)}"
    what = f"{rng.choice(_VERBS)} the {rng.choice(_OBJECTS)}"
    return f"The {who} {what} {rng.choice(_ENDINGS)}."


def _fact(key: str, value: str) -> str:
    return f"Note: {key}->{value}."


def _question(key: str) -> str:
    return f"What is the value of {key}?"


def _facts(rng: random.Random, count: int, held: bool) -> dict[str, str]:
    """Some keys in random order, each with a value on the wanted side of the split."""
    facts = {}
    for key in rng.sample(KEYS, count):
        value = rng.choice(VALUES)
        while is_held_out(f"lookup {key} {value}") != held:
            value = rng.choice(VALUES)
        facts[key] = value
    return facts


def _passage(
    rng: random.Random,
    facts: dict[str, str],
    tokens: int,
    density: float,
    filler: Callable[[], str] | None = None,
    restated: float = 0.0,
) -> list[str]:
    """Facts and filler of about `tokens` tokens; the facts used are taken out of `facts`.

    A share `restated` of the facts are said again: in training, a second mention is one more place
    where the value can be predicted from the key.
    """
    parts: list[str] = []
    said: list[str] = []
    while tokens > 0:
        repeats = restated > 0 and bool(said) and (not facts or rng.random() < restated)
        if (repeats or facts) and rng.random() < density:
            if repeats:
                fact = rng.choice(said)
            else:
                fact = _fact(*facts.popitem())
                said.append(fact)
            parts.append(fact)
            tokens -= _FACT_TOKENS
        else:
            sentence = filler() if filler else filler_sentence(rng)
            parts.append(sentence)
            tokens -= round(_TOKENS_PER_WORD * len(sentence.split())) + 1
    return parts


def _spaced(rng: random.Random, a: int, sign: str, b: int) -> str:
    """Mostly the plain phrasing; now and then the one with spaces."""
    return f"What is {a} {sign} {b}?" if rng.random() < 0.3 else f"What is {a}{sign}{b}?"


def _operand(rng: random.Random, held: bool) -> int:
    """Held-out questions have two-digit operands; training also meets smaller ones, which are easier."""
    if held:
        return rng.randint(10, 99)
    return rng.randint(0, 9) if rng.random() < 0.15 else rng.randint(0, 99)


def _addition(rng: random.Random, held: bool) -> Example:
    while True:
        a, b = _operand(rng, held), _operand(rng, held)
        if is_held_out(f"add {min(a, b)} {max(a, b)}") == held:
            # Held-out questions use the plain phrasing only: it is the documented one.
            prompt = f"What is {a}+{b}?" if held else _spaced(rng, a, "+", b)
            return Example(prompt, str(a + b))


def _subtraction(rng: random.Random, held: bool) -> Example:
    while True:
        b, a = sorted((_operand(rng, held), _operand(rng, held)))
        if is_held_out(f"subtract {a} {b}") == held:
            prompt = f"What is {a}-{b}?" if held else _spaced(rng, a, "-", b)
            return Example(prompt, str(a - b))


def _copying(rng: random.Random, held: bool) -> Example:
    while True:
        longest = 5 if held else 10
        words = [rng.choice(VALUES if i == 0 else KEYS) for i in range(rng.randint(2, longest))]
        words = [_pseudo_word(rng) if rng.random() < 0.2 else word for word in words]
        phrase = " ".join(words)
        if is_held_out(f"copy {phrase}") == held:
            return Example(f'Repeat "{phrase}".', phrase)


def _reversal(rng: random.Random, held: bool) -> Example:
    """Letters are joined by hyphens so that each is one token: the model sees letters, not word pieces."""
    while True:
        word = rng.choice(KEYS + VALUES) if rng.random() < 0.3 else _pseudo_word(rng)
        word = word[:6]
        if is_held_out(f"reverse {word}") == held:
            return Example(f'Reverse "{"-".join(word)}".', "-".join(reversed(word)))


def _pseudo_word(rng: random.Random) -> str:
    pools = [_CONSONANTS, _VOWELS] if rng.random() < 0.7 else [_VOWELS, _CONSONANTS]
    return "".join(rng.choice(pools[i % 2]) for i in range(rng.randint(3, 6)))


_GENERATORS = {"add": _addition, "subtract": _subtraction, "copy": _copying, "reverse": _reversal}

"""Text passages that stand in for images, each with a question whose answer is one token of the passage."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Encoder: TypeAlias = Callable[[str], list[tuple[int, int, int]]]
"""Tokens of a text: their ids, and where each begins and ends in it."""

TOKENS = 208
"""Tokens of every passage: the visual tokens."""
KINDS = ("needle", "facts", "list")
"""needle: one secret word in prose. facts: four people, who chose one thing each. list: the word that follows in a list
whose part is repeated. Chains of two facts were tried and left out: the unrouted model answers them by chance."""

NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Noah",
    "Paul",
    "Rose",
    "Sam",
    "Tom",
    "Victor",
    "Will",
    "Alice",
    "Peter",
    "Laura",
    "Mark",
    "Sarah",
    "Simon",
    "Lucy",
    "George",
    "Jane",
    "Robert",
    "Helen",
    "Martin",
    "Diana",
    "Oscar",
    "Julia",
    "Eric",
    "Nina",
    "Adam",
    "Ruth",
)
WORDS = (
    "apple",
    "lemon",
    "banana",
    "peach",
    "cherry",
    "melon",
    "orange",
    "grape",
    "pear",
    "plum",
    "potato",
    "carrot",
    "onion",
    "tomato",
    "garlic",
    "cabbage",
    "pepper",
    "bread",
    "cheese",
    "butter",
    "honey",
    "sugar",
    "salt",
    "rice",
    "milk",
)
PROSE = (
    "The weather was calm in the morning, and the market opened late.",
    "People walked along the river and talked about the news.",
    "A small boat crossed the lake while the sun was rising.",
    "The old library near the square was closed for repairs.",
    "Several students waited for the bus in front of the station.",
    "In the evening the street lights came on one after another.",
    "The museum showed paintings from the last century.",
    "A train left the station with only a few passengers on it.",
    "The garden behind the house was full of flowers in spring.",
    "Nobody noticed that the clock on the tower had stopped.",
    "The baker opened his shop before the first customers arrived.",
    "Children played in the park until it started to rain.",
    "The bridge over the canal was painted again last summer.",
    "A letter arrived at the office without any name on it.",
    "The teacher closed the window because of the noise outside.",
    "Two workers carried a heavy table up the narrow stairs.",
    "The road to the village was covered with snow all winter.",
    "A young man sat on the bench and read a thick book.",
    "The theatre sold all of its tickets within a single day.",
    "Behind the school there was a field where nobody played.",
    "The mayor gave a short speech and then everybody went home.",
    "An empty truck stood in front of the factory for a week.",
)


@dataclass(frozen=True)
class Item:
    """A passage with a question."""

    kind: str
    passage: tuple[int, ...]
    """`TOKENS` ids."""
    question: tuple[int, ...]
    """Ids of the text behind the passage; the answer is the next token."""
    answer: int
    candidates: tuple[int, ...]
    """Ids of the possible answers in the passage, the right one among them."""
    evidence: tuple[int, ...]
    """Places of the tokens of the answer in the passage."""
    sentence: tuple[int, ...]
    """Places of the tokens of the sentence or part of the list that tells it."""

    @property
    def chance(self) -> float:
        """The share of right choices among the candidates by chance."""
        return 1 / len(self.candidates)


@dataclass(frozen=True)
class _Text:
    passage: str
    told: str
    """The part of the passage that tells the answer; it is there once."""
    question: str
    answer: str
    candidates: Sequence[str]


def _secret(name: str, word: str) -> str:
    return f"The secret word of {name} is {word}."


def _ask(name: str) -> str:
    return f"\n\nQuestion: What is the secret word of {name}?\nAnswer: The secret word of {name} is"


def _scattered(draw: random.Random, facts: Sequence[str]) -> str:
    """Facts between sentences of prose, early enough to stand before the passage is cut off."""
    sentences = draw.sample(PROSE, len(PROSE))
    for place, fact in zip(draw.sample(range(1, 15), len(facts)), facts, strict=True):
        sentences[place] = fact
    return " " + " ".join(sentences)


def _needle(draw: random.Random, words: Sequence[str]) -> _Text:
    names, chosen = draw.sample(NAMES, 5), draw.sample(words, 5)
    told = _secret(names[0], chosen[0])
    others = [f"{name} wanted to buy some {word}." for name, word in zip(names[1:], chosen[1:], strict=True)]
    return _Text(_scattered(draw, [told, *others]), told, _ask(names[0]), chosen[0], chosen)


def _facts(draw: random.Random, words: Sequence[str]) -> _Text:
    names, chosen = draw.sample(NAMES, 4), draw.sample(words, 4)
    facts = [f"{name} chose the {word}." for name, word in zip(names, chosen, strict=True)]
    question = f"\n\nQuestion: What did {names[0]} choose?\nAnswer: {names[0]} chose the"
    return _Text(_scattered(draw, facts), facts[0], question, chosen[0], chosen)


def _list(draw: random.Random, words: Sequence[str]) -> _Text:
    chosen = draw.sample(words, 12)
    begins = draw.randrange(9)
    asked = chosen[begins : begins + 3]
    told = f"{', '.join(asked)}, {chosen[begins + 3]}"
    prose = draw.sample(PROSE, len(PROSE))
    before = draw.randrange(1, 12)
    passage = f" {' '.join(prose[:before])} The list: {', '.join(chosen)}. {' '.join(prose[before:])}"
    return _Text(passage, told, f"\n\nThe list again: ... {', '.join(asked)},", chosen[begins + 3], chosen)


_MAKE: Mapping[str, Callable[[random.Random, Sequence[str]], _Text]] = {
    "needle": _needle,
    "facts": _facts,
    "list": _list,
}


def make_item(kind: str, number: int, seed: int, encode: Encoder) -> Item:
    """An item, the same for the same arguments.

    Args:
        kind: one of `KINDS`.
        number: of the item.
        seed: of a set of items; sets of other seeds are other items.
        encode: splits texts into tokens. Words of which it makes several are not asked for.

    Raises:
        ValueError: a passage is too short, or its answer stands behind its end.
    """
    draw = random.Random(f"{kind} {number} {seed}")
    words = [word for word in WORDS if len(encode(f" {word}")) == 1]
    text = _MAKE[kind](draw, words)
    tokens = encode(text.passage)
    begins = text.passage.index(text.told)
    ends = begins + len(text.told)
    within = tuple(place for place, (_, start, end) in enumerate(tokens) if start < ends and end > begins)
    (answer,) = (each for each, _, _ in encode(f" {text.answer}"))
    evidence = tuple(place for place in within if tokens[place][0] == answer)
    if len(tokens) < TOKENS or not evidence or within[-1] >= TOKENS:
        raise ValueError(f"a passage must have {TOKENS} tokens with the answer in them, got {len(tokens)} of {kind}")
    return Item(
        kind,
        tuple(each for each, _, _ in tokens[:TOKENS]),
        tuple(each for each, _, _ in encode(text.question)),
        answer,
        tuple(encode(f" {word}")[0][0] for word in text.candidates),
        evidence,
        within,
    )


def encoder_of(tokenizer) -> Encoder:
    """Encoder of a tokenizer of transformers."""

    def encode(text: str) -> list[tuple[int, int, int]]:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(each, *place) for each, place in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    return encode

"""Texts with facts in them, and the questions that ask for the facts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import ArgumentError
from ..llama import Llama

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

PLACES = (
    "Ashcombe lighthouse",
    "Brindle observatory",
    "Corvane library",
    "Dunmore granary",
    "Eastfold museum",
    "Farrow aqueduct",
    "Glenholt chapel",
    "Harrowgate mint",
    "Ilverton archive",
    "Juniper foundry",
    "Kestrel theatre",
    "Larkspur harbour",
    "Merrow hospital",
    "Northwick arsenal",
    "Osmund cathedral",
)
FIRST = ("Agnes", "Bertram", "Clara", "Desmond", "Edith", "Felix", "Greta", "Hector", "Irene", "Jasper")
LAST = ("Whitlock", "Marlowe", "Penrose", "Sandford", "Tolliver", "Umber", "Vance", "Wexford", "Yarrow", "Zeller")
MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")

CITIES = ("Lisbon", "Bergen", "Krakow", "Valencia", "Tallinn", "Antwerp", "Galway", "Turin")
JOBS = ("plumber", "surgeon", "translator", "carpenter", "pilot", "florist", "librarian", "baker")

KINDS = {
    # kind: (sentence with {place} and {value}, question, start of the answer)
    "number": (
        " The access code of the {place} is {value}.",
        "What is the access code of the {place}?",
        "The access code of the {place} is",
    ),
    "name": (
        " The keeper of the {place} is called {value}.",
        "What is the keeper of the {place} called?",
        "The keeper of the {place} is called",
    ),
    "date": (
        " The {place} was opened on {value}.",
        "When was the {place} opened?",
        "The {place} was opened on",
    ),
}


PARAPHRASES = {
    "number": ("Which digits open the door of the {place}?", "The door of the {place} opens with the digits"),
    "name": ("Who looks after the {place}?", "The person who looks after the {place} is"),
    "date": (
        "On which day could the public enter the {place} for the first time?",
        "The public could first enter the {place} on",
    ),
}


def recalled(answers: Sequence[str], text: str) -> float:
    """Share of the answers that a text holds, each as whole words."""
    return sum(bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)) for answer in answers) / len(answers)


@dataclass(frozen=True)
class Fact:
    """What is asked for, and the sentences that tell it."""

    kind: str
    depth: float  # of its place among the facts; of several sentences most lie elsewhere
    sentences: tuple[tuple[float, str], ...]  # depth and text
    prompt: str  # question and the start of its answer
    answers: tuple[str, ...]  # all must be given, in any order


@dataclass(frozen=True)
class Case:
    """A text of about n_tokens with facts in it, and the text that follows it."""

    tokens: list[int]
    following: list[int]
    facts: list[Fact]


def _prompt(question: str, start: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer: {start}"


def _value(rnd: random.Random, kind: str) -> str:
    if kind == "number":
        return str(rnd.randrange(10000, 99999))
    if kind == "name":
        return f"{rnd.choice(FIRST)} {rnd.choice(LAST)}"
    return f"{rnd.randrange(1, 29)} {rnd.choice(MONTHS)} {rnd.randrange(1700, 1900)}"


def _simple(rnd: random.Random, kind: str, depth: float, place: str, paraphrased: bool = False) -> Fact:
    value = _value(rnd, kind)
    sentence, *asked = KINDS[kind]
    question, start = PARAPHRASES[kind] if paraphrased else asked
    prompt = _prompt(question, start).format(place=place)
    return Fact(
        "paraphrase" if paraphrased else kind,
        depth,
        ((depth, sentence.format(place=place, value=value)),),
        prompt,
        (value,),
    )


def single_facts(seed: int) -> list[Fact]:
    """One fact per depth; the kinds take turns, so that any three seeds in a row have every kind at every depth."""
    rnd = random.Random(seed)
    places = rnd.sample(PLACES, len(DEPTHS))
    kinds = list(KINDS)
    return [
        _simple(rnd, kinds[(i + seed) % len(kinds)], depth, place)
        for i, (place, depth) in enumerate(zip(places, DEPTHS, strict=True))
    ]


def ruler_facts(seed: int) -> list[Fact]:
    """In the manner of RULER: a fact among four of its like, one in other words, one of three values, one behind a
    chain of three variables, and a plain one. The kinds take turns at the depths, so that any five seeds in a row have
    every kind at every depth.
    """
    rnd = random.Random(f"ruler {seed}")
    places = iter(rnd.sample(PLACES, 8))
    kind_of = iter(rnd.choice(list(KINDS)) for _ in DEPTHS)

    def elsewhere() -> float:
        return rnd.uniform(0.05, 0.95)

    def multikey(depth: float) -> Fact:
        kind = next(kind_of)
        asked = _simple(rnd, kind, depth, next(places))
        others = [_simple(rnd, kind, elsewhere(), next(places)) for _ in range(3)]
        return replace(
            asked, kind="multikey", sentences=asked.sentences + tuple(s for o in others for s in o.sentences)
        )

    def multivalue(depth: float) -> Fact:
        place = next(places)
        names = tuple(" ".join(name) for name in zip(rnd.sample(FIRST, 3), rnd.sample(LAST, 3), strict=True))
        told = tuple(
            (d, f" A guide of the {place} is called {name}.")
            for d, name in zip((depth, elsewhere(), elsewhere()), names, strict=True)
        )
        return Fact(
            "multivalue",
            depth,
            told,
            _prompt(f"What are the three guides of the {place} called?", f"The guides of the {place} are called"),
            names,
        )

    def tracking(depth: float) -> Fact:
        names, value = (
            rnd.sample([f"VAR_{c}{n}" for c in "ABCDEFGH" for n in range(1, 10)], 3),
            str(rnd.randrange(10000, 99999)),
        )
        told = (f" Set {names[0]} = {value}.", f" Set {names[1]} = {names[0]}.", f" Set {names[2]} = {names[1]}.")
        depths = sorted([depth, elsewhere(), elsewhere()])
        return Fact(
            "tracking",
            depth,
            tuple(zip(depths, told, strict=True)),
            _prompt(f"What number is {names[2]}?", f"The number {names[2]} is"),
            (value,),
        )

    makers = (
        multikey,
        lambda depth: _simple(rnd, next(kind_of), depth, next(places), paraphrased=True),
        multivalue,
        tracking,
        lambda depth: _simple(rnd, next(kind_of), depth, next(places)),
    )
    return [makers[(i + seed) % len(makers)](depth) for i, depth in enumerate(DEPTHS)]


def chat_facts(seed: int, n_facts: int) -> list[tuple[str, str, str, str]]:
    """What a user tells of himself: (statement, question, start of the answer, answer); no two of one kind."""
    rnd = random.Random(f"chat {seed}")
    kinds = (
        (
            "By the way, my sister is called {}.",
            "What is my sister called?",
            "Your sister is called",
            f"{rnd.choice(FIRST)} {rnd.choice(LAST)}",
        ),
        (
            "By the way, the code of my suitcase is {}.",
            "What is the code of my suitcase?",
            "The code of your suitcase is",
            str(rnd.randrange(1000, 9999)),
        ),
        ("By the way, I was born in {}.", "In which city was I born?", "You were born in", rnd.choice(CITIES)),
        (
            "By the way, my train leaves on {}.",
            "On which day does my train leave?",
            "Your train leaves on",
            f"{rnd.randrange(1, 29)} {rnd.choice(MONTHS)}",
        ),
        ("By the way, I work as a {}.", "What do I work as?", "You work as a", rnd.choice(JOBS)),
    )
    return [(told.format(value), question, start, value) for told, question, start, value in rnd.sample(kinds, n_facts)]


SUITES = {"single": single_facts, "ruler": ruler_facts}


def make_case(
    llm: Llama, text_tokens: list[int], seed: int, n_tokens: int, n_following: int, suite: str = "single"
) -> Case:
    """Cut a piece out of a text at random and put facts in at the ends of its sentences.

    Parameters
    ----------
    llm : Llama
        For its tokenizer.
    text_tokens : list of int
        Tokens of a text longer than n_tokens + n_following.
    n_tokens : int
        Length of the case, facts and BOS included.
    suite : str
        One of `SUITES`.

    Raises
    ------
    ArgumentError
        The text is too short.
    """
    rnd = random.Random(1000 + seed)
    facts = SUITES[suite](seed)
    told = sorted((depth, sentence) for fact in facts for depth, sentence in fact.sentences)
    sentences = [llm.tokenize(sentence.encode(), add_bos=False, special=False) for _, sentence in told]
    bos = llm.tokenize(b"", special=False)
    n_body = n_tokens - len(bos) - sum(map(len, sentences))
    n_spare = len(text_tokens) - n_body - n_following
    if n_body < 1 or n_spare < 1:
        raise ArgumentError(
            f"text: expected more than {n_body + n_following} tokens for a case of {n_tokens} tokens and "
            f"{n_following} behind it, got {len(text_tokens)}; name a longer text or a smaller length"
        )
    begin = rnd.randrange(n_spare)
    body = text_tokens[begin : begin + n_body]
    ends = [i + 1 for i, t in enumerate(body) if llm.detokenize([t]).rstrip(b" ").endswith((b".", b"!", b"?"))] or [
        n_body
    ]
    places = [min(ends, key=lambda e: abs(e - depth * n_body)) for depth, _ in told]
    tokens = list(bos)
    for start, end, sentence in zip([0, *places[:-1]], places, sentences, strict=True):
        tokens += body[start:end] + sentence
    tokens += body[places[-1] :]
    return Case(tokens, text_tokens[begin + n_body : begin + n_body + n_following], facts)

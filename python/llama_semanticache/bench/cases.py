"""Texts with facts in them, and the questions that ask for the facts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..llama import Llama

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

PLACES = (
    "Ashcombe lighthouse", "Brindle observatory", "Corvane library", "Dunmore granary", "Eastfold museum",
    "Farrow aqueduct", "Glenholt chapel", "Harrowgate mint", "Ilverton archive", "Juniper foundry",
    "Kestrel theatre", "Larkspur harbour", "Merrow hospital", "Northwick arsenal", "Osmund cathedral",
)  # fmt: skip
FIRST = ("Agnes", "Bertram", "Clara", "Desmond", "Edith", "Felix", "Greta", "Hector", "Irene", "Jasper")
LAST = ("Whitlock", "Marlowe", "Penrose", "Sandford", "Tolliver", "Umber", "Vance", "Wexford", "Yarrow", "Zeller")
MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")

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


@dataclass(frozen=True)
class Fact:
    """One fact, where it stands, and how it is asked for."""

    kind: str
    depth: float
    sentence: str
    prompt: str  # question and the start of its answer
    answer: str  # what must follow, without leading space


@dataclass(frozen=True)
class Case:
    """A text of about n_tokens with facts in it, and the text that follows it."""

    tokens: list[int]
    following: list[int]
    facts: list[Fact]


def make_facts(seed: int) -> list[Fact]:
    """One fact per depth; the kinds take turns, so that any three seeds in a row have every kind at every depth."""
    rnd = random.Random(seed)
    places = rnd.sample(PLACES, len(DEPTHS))
    kinds = list(KINDS)
    facts = []
    for i, (place, depth) in enumerate(zip(places, DEPTHS)):
        kind = kinds[(i + seed) % len(kinds)]
        value = {
            "number": str(rnd.randrange(10000, 99999)),
            "name": f"{rnd.choice(FIRST)} {rnd.choice(LAST)}",
            "date": f"{rnd.randrange(1, 29)} {rnd.choice(MONTHS)} {rnd.randrange(1700, 1900)}",
        }[kind]
        sentence, question, start = KINDS[kind]
        prompt = f"\n\nQuestion: {question}\nAnswer: {start}".format(place=place)
        facts.append(Fact(kind, depth, sentence.format(place=place, value=value), prompt, value))
    return facts


def make_case(llm: Llama, text_tokens: list[int], seed: int, n_tokens: int, n_following: int) -> Case:
    """Cut a piece out of a text at random and put facts in at the ends of its sentences.

    Parameters
    ----------
    llm : Llama
        For its tokenizer.
    text_tokens : list of int
        Tokens of a text longer than n_tokens + n_following.
    n_tokens : int
        Length of the case, facts and BOS included.
    """
    rnd = random.Random(1000 + seed)
    facts = make_facts(seed)
    sentences = [llm.tokenize(f.sentence.encode(), add_bos=False, special=False) for f in facts]
    bos = [llm.token_bos()] if llm.metadata.get("tokenizer.ggml.add_bos_token") == "true" else []
    n_body = n_tokens - len(bos) - sum(map(len, sentences))
    begin = rnd.randrange(len(text_tokens) - n_body - n_following)
    body = text_tokens[begin : begin + n_body]
    ends = [i + 1 for i, t in enumerate(body) if llm.detokenize([t]).rstrip(b" ").endswith((b".", b"!", b"?"))]
    places = [min(ends, key=lambda e: abs(e - depth * n_body)) for depth in DEPTHS]
    tokens = list(bos)
    for start, end, sentence in zip([0, *places], places, sentences):
        tokens += body[start:end] + sentence
    tokens += body[places[-1] :]
    return Case(tokens, text_tokens[begin + n_body : begin + n_body + n_following], facts)

"""A long conversation: facts that the user tells in the first turns are asked for in the last one.

    llama-semanticache bench chat MODEL --text FILE --setting semanticache:0.25 --setting shift:0.25 --json chat.json

The user tells a fact in each of the first turns and asks for stories from then on; the assistant's answers are pieces
of a text, so that the conversation is the same for every cache. "shift:RATIO" is what llama.cpp does when its context
is full (`n_keep` and context shift): a cache of as many bytes as ours at that ratio forgets the older half of what is
behind the first message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import click

from .. import models
from .._progress import progress
from ..cli.common import model_argument
from ..errors import ArgumentError
from ..llama import Llama
from ..memory import estimate
from ..shape import ModelShape
from .cases import chat_facts
from .harness import Snapshot, continue_greedily, render
from .options import gpu_layers_option, json_option, text_option, threads_option, without_base_option
from .runs import Run
from .settings import BASE, check_settings, context_options, llama_options, profiles_of, with_base
from .tables import count, print_table

SYSTEM = "You are a helpful assistant who remembers what the user says."
REQUESTS = ("Tell me a story.", "Go on, please.", "What happened then?", "I like it, tell me more.", "And after that?")


def conversation(
    llm: Llama, text: str, seed: int, n_turns: int, n_facts: int, n_answer: int
) -> tuple[list[dict[str, str]], list[tuple[str, str, str, str]]]:
    """Messages of n_turns turns, and the facts told in the first of them."""
    facts = chat_facts(seed, n_facts)
    tokens = llm.tokenize(text.encode(), add_bos=False, special=False)
    if len(tokens) < (seed + 1) * n_turns * n_answer:
        raise ArgumentError(
            f"text: expected at least {(seed + 1) * n_turns * n_answer} tokens, got {len(tokens)}; name a longer one "
            "or fewer conversations"
        )
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(n_turns):
        told = f"{facts[turn][0]} " if turn < len(facts) else ""
        begin = (seed * n_turns + turn) * n_answer
        messages.append({"role": "user", "content": told + REQUESTS[turn % len(REQUESTS)]})
        messages.append(
            {
                "role": "assistant",
                "content": llm.detokenize(tokens[begin : begin + n_answer]).decode("utf-8", "ignore").strip(),
            }
        )
    return messages, facts


def shift_if_full(llm: Llama, n_more: int, n_keep: int) -> None:
    """llama.cpp's context shift: behind the first n_keep tokens the older half goes, the rest moves up."""
    while llm.n_tokens + n_more > llm.n_ctx():
        n_discard = (llm.n_tokens - n_keep) // 2
        llm._ctx.kv_cache_seq_rm(0, n_keep, n_keep + n_discard)
        llm._ctx.kv_cache_seq_shift(0, n_keep + n_discard, llm.n_tokens, -n_discard)
        llm.input_ids[n_keep : llm.n_tokens - n_discard] = llm.input_ids[n_keep + n_discard : llm.n_tokens].copy()
        llm.n_tokens -= n_discard


def measure_chat(
    llm: Llama, messages: Sequence[dict[str, str]], facts: Sequence[tuple[str, str, str, str]], shift: bool
) -> dict[str, Any]:
    """Reads a conversation, then asks for every fact from where it ended."""
    tokens = render(llm, messages, prompt=False)
    n_keep = len(render(llm, messages[:1], prompt=False))
    whole = [render(llm, [*messages, {"role": "user", "content": f[1]}], prompt=True) for f in facts]
    if any(w[: len(tokens)] != tokens for w in whole):
        raise ArgumentError(
            "model: expected a chat template that only adds to what was said before, got another; take another model"
        )
    asked = [w[len(tokens) :] for w in whole]
    room = max(map(len, asked)) + 32
    if not shift and len(tokens) + room > llm.n_ctx():
        raise ArgumentError(
            f"--n-ctx: expected at least {len(tokens) + room} for this conversation, got {llm.n_ctx()}; raise it or "
            "take fewer turns"
        )
    llm.reset()
    step = llm.n_batch // 2
    for first in range(0, len(tokens), step):
        part = tokens[first : first + step]
        if shift:  # the questions' room is made before the last part: what was shifted is turned by the next eval
            shift_if_full(llm, len(part) + (room if first + step >= len(tokens) else 0), n_keep)
        llm.eval(part)
    stats = llm.kv_stats()
    snapshot = Snapshot(llm)
    answers = []
    for turn, (question, (_, _, start, want)) in enumerate(zip(asked, facts, strict=True), 1):
        snapshot.restore(llm)
        begin, end = (llm.tokenize(text.encode(), add_bos=False, special=False) for text in (start, want))
        got = continue_greedily(llm, [*question, *begin], len(end) + 3)
        answers.append({"turn": turn, "want": want, "got": got})
    return {"tokens": len(tokens), "kv_bytes": stats.total_bytes, "answers": answers}


def has_words(answer: str, fact: str) -> bool:
    """Whether all words of a fact stand in an answer, in any order: who is told "17 March" may say "March 17th"."""
    return all(re.search(rf"\b{re.escape(word)}(st|nd|rd|th)?\b", answer) for word in fact.split())


def chat_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Facts recalled by cache, and by the turn that told them."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, record in run["records"].items():
        part, setting, number = name.split("|")
        if part == "chat":
            groups.setdefault(setting, {})[number] = record

    def n_right(records: Iterable[dict[str, Any]]) -> int:
        return sum(has_words(a["got"], a["want"]) for r in records for a in r["answers"])

    turns = range(1, run["asked"]["n_facts"] + 1)
    cells = []
    for setting, chats in groups.items():
        records, answers = list(chats.values()), [a for r in chats.values() for a in r["answers"]]
        right, base = n_right(records), n_right(r for number, r in groups.get(BASE, {}).items() if number in chats)
        by_turn = [[has_words(a["got"], a["want"]) for a in answers if a["turn"] == t] for t in turns]
        cells.append(
            [
                setting,
                f"{right}/{len(answers)}",
                f"{right / base:.0%}" if base else "",
                *(f"{sum(s)}/{len(s)}" for s in by_turn),
                f"{records[0]['kv_bytes'] / 2**20:.1f}",
            ]
        )
    return ["cache", "facts", "of full", *(f"turn {t}" for t in turns), "KV MiB"], cells


def chat_options(setting: str, shape: ModelShape, n_ctx: int) -> tuple[dict[str, Any], int]:
    """Arguments of `Llama`, and the context: of "shift:RATIO" as many tokens as fit the bytes of ours at that ratio."""
    if not setting.startswith("shift:"):
        return llama_options(setting), n_ctx
    try:
        ratio = float(setting.removeprefix("shift:"))
    except ValueError as error:
        raise ArgumentError(f"setting: expected shift:RATIO, got {setting!r}; as in shift:0.25") from error
    ours = estimate(shape, n_ctx, "semanticache", kv_ratio=ratio).kv_bytes
    return {}, int(ours / estimate(shape, n_ctx, "f16").kv_bytes * n_ctx) // 256 * 256


@click.command()
@model_argument
@text_option("Text that the assistant's answers are pieces of.")
@click.option("--turns", "n_turns", type=click.IntRange(min=6), default=30, show_default=True)
@click.option(
    "--facts", "n_facts", type=click.IntRange(1, 5), default=5, show_default=True, help="Told in the first turns."
)
@click.option(
    "--n-answer", type=click.IntRange(min=1), default=240, show_default=True, help="Tokens of an assistant's answer."
)
@click.option("--chats", "n_chats", type=click.IntRange(min=1), default=3, show_default=True, help="Conversations.")
@click.option(
    "--first-chat",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the first conversation; they are reproducible by number.",
)
@click.option(
    "--setting",
    "settings",
    multiple=True,
    help="As in bench quality, or shift:RATIO; repeatable. stock:f16 is always there.",
)
@without_base_option
@click.option(
    "--n-ctx", type=click.IntRange(min=1024), default=8960, show_default=True, help="Must hold the whole conversation."
)
@gpu_layers_option
@threads_option
@json_option
def chat(
    model,
    text_path,
    n_turns,
    n_facts,
    n_answer,
    n_chats,
    first_chat,
    settings,
    without_base,
    n_ctx,
    n_gpu_layers,
    threads,
    json_path,
) -> None:
    """Facts of a conversation's first turns, asked for in its last, also against llama.cpp's context shift."""
    model_file = models.open_model(model)
    settings = with_base(
        settings or ("semanticache:0.25", "semanticache:0.125", "streaming:0.3", "shift:0.25"), without_base
    )
    options = {setting: chat_options(setting, model_file.shape, n_ctx) for setting in settings}
    check_settings(model_file, [s for s in settings if not s.startswith("shift:")], n_ctx)
    profiles = profiles_of(model_file, settings, threads)
    run = Run(
        json_path,
        "chat",
        {
            "model": model_file.name,
            "text": text_path.name,
            "n_turns": n_turns,
            "n_facts": n_facts,
            "n_answer": n_answer,
            "n_chats": n_chats,
            "first_chat": first_chat,
            "settings": settings,
            "n_ctx": n_ctx,
            "n_gpu_layers": n_gpu_layers,
            "threads": threads,
        },
        [model_file, text_path, *profiles],
    )
    text = models.read_text(text_path)
    numbers = range(first_chat, first_chat + n_chats)
    with progress("measuring", len(settings) * n_chats, "chats") as bar:
        for setting in settings:
            names = [f"chat|{setting}|{i}" for i in numbers]
            if all(name in run.records for name in names):
                bar.advance(n_chats)
                continue
            arguments, n = options[setting]
            with closing(Llama(model_file, **context_options(n, threads, n_gpu_layers), **arguments)) as llm:
                chats = [conversation(llm, text, i, n_turns, n_facts, n_answer) for i in numbers]
                for name, (messages, facts) in zip(names, chats, strict=True):
                    bar.say(setting)
                    run.record(name, partial(measure_chat, llm, messages, facts, setting.startswith("shift:")))
                    bar.advance()
    print_table(
        f"{model_file.name}, {count(n_chats, 'conversation')} of {n_turns} turns, n_ctx {n_ctx}", *chat_table(run.data)
    )

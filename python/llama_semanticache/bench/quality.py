"""Does the model still remember? Facts, and the text that follows, each against the uncompressed cache.

    llama-semanticache bench quality MODEL --text FILE --n-tokens 7600 --cases 3 --setting semanticache:0.25 \\
        --json quality.json
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import models
from .._progress import progress
from ..cli.common import model_argument
from ..errors import ArgumentError
from ..llama import Llama
from ..model_file import ModelFile
from .cases import SUITES, Case, Fact, make_case, recalled
from .harness import Loader, Snapshot, continue_greedily, log_softmax, next_logits, read_in
from .options import gpu_layers_option, json_option, setting_option, text_option, threads_option
from .process import Worker
from .runs import Run
from .settings import (
    BASE,
    DEFAULT_SETTINGS,
    MATCHING,
    check_peer,
    check_settings,
    context_options,
    is_peer,
    parse_peer,
    peer_rows,
    profiles_of,
    with_base,
)
from .tables import count, print_table

KVPRESS_VARIABLE = "LLAMA_SEMANTICACHE_KVPRESS_PYTHON"


def follow(llm: Llama, case: Case) -> np.ndarray:
    """Log-probabilities after each of the tokens that follow the case, [n, n_vocab]; its text is in the cache."""
    step = min(128, llm.n_batch)
    return log_softmax(
        np.concatenate([next_logits(llm, case.following[i : i + step]) for i in range(0, len(case.following), step)])
    )


def divergence(reference: np.ndarray, logp: np.ndarray, following: Sequence[int]) -> dict[str, float]:
    """Means over the following tokens: KL divergence (nats), share with the same most likely token, log of the factor
    by which the perplexity rises.

    Parameters
    ----------
    reference, logp : ndarray, shape [n, n_vocab]
        Log-probabilities of the uncompressed cache and of another.
    following : sequence of int, length n
        The tokens after whose first n - 1 the others are expected.
    """
    at = (np.arange(len(following) - 1), following[1:])
    return {
        "kl": float((np.exp(reference) * (reference - logp)).sum(-1).mean()),
        "same_top": float((reference.argmax(-1) == logp.argmax(-1)).mean()),
        "log_ppl": float((reference[at] - logp[at]).mean()),
    }


def question_of(llm: Llama, fact: Fact) -> tuple[list[int], int]:
    """Tokens of the question and the start of its answer, and the tokens that the rest of the answer may take."""
    tokens = llm.tokenize(fact.prompt.encode(), add_bos=False, special=False)
    return tokens, len(llm.tokenize(" and ".join(fact.answers).encode(), add_bos=False, special=False)) + 2


def answers_of(case: Case, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The answers to the case's questions, beside what was wanted; a table judges them."""
    return [
        {"kind": f.kind, "depth": f.depth, "want": list(f.answers), "got": text}
        for f, text in zip(case.facts, texts, strict=True)
    ]


def ask(llm: Llama, case: Case, questions: Sequence[tuple[list[int], int]], snapshot: Snapshot) -> list[dict[str, Any]]:
    """The answers to the case's questions, each from the same snapshot."""
    texts = []
    for question in questions:
        snapshot.restore(llm)
        texts.append(continue_greedily(llm, *question))
    return answers_of(case, texts)


class Peers(ExitStack):
    """Methods that run in transformers: a process of their own, which gets the model when it is first asked."""

    def __init__(self, python: Path | None, model: ModelFile):
        super().__init__()
        self.python, self.model = python, model
        self.worker: Worker | None = None

    def measure(
        self, setting: str, name: str, case: Case, questions: Sequence[tuple[list[int], int]]
    ) -> dict[str, Any]:
        """The record of such a setting for a case of that name."""
        if self.worker is None:
            self.worker = self.enter_context(
                Worker("transformers", [str(self.python), str(Path(__file__).with_name("transformers_worker.py"))])
            )
            self.worker.ask(load=str(self.model.path.resolve()))
        peer = parse_peer(setting)
        budgets = {"rows": peer_rows(self.model, peer, len(case.tokens))} if peer.name == MATCHING else {}
        record = self.worker.ask(
            case=name,
            tokens=case.tokens,
            following=case.following,
            press=peer.name,
            keep=peer.keep,
            questions=[{"tokens": tokens, "n": n_answer} for tokens, n_answer in questions],
            **budgets,
        )
        return {**record, "answers": answers_of(case, record.pop("texts"))}


def measure_texts(
    run: Run,
    load: Loader,
    text: str,
    settings: Sequence[str],
    lengths: Sequence[int],
    numbers: Sequence[int],
    suite: str,
    n_following: int,
    peers: Peers,
) -> None:
    """Records "text|SETTING|LENGTH|CASE" for the cases of these numbers, all cases of a setting one after the other."""

    def name_of(setting: str, key: tuple[int, int]) -> str:
        return f"text|{setting}|{key[0]}|{key[1]}"

    keys = [(n, i) for n in lengths for i in numbers]
    missing = {(s, key) for s in settings for key in keys if name_of(s, key) not in run.records}
    keys = [key for key in keys if any((s, key) in missing for s in settings)]
    if not keys:
        return
    llm = load(BASE)
    tokens = llm.tokenize(text.encode(), add_bos=False, special=False)
    cases = {(n, i): make_case(llm, tokens, i, n, n_following, suite) for n, i in keys}
    questions = {key: [question_of(llm, fact) for fact in case.facts] for key, case in cases.items()}
    references: dict[tuple[int, int], np.ndarray] = {}

    def measure(setting: str, key: tuple[int, int]) -> dict[str, Any]:
        case, llm = cases[key], load(setting)
        record = read_in(llm, case.tokens)
        snapshot = Snapshot(llm)
        logp = follow(llm, case)
        if setting == BASE:
            references[key] = logp
        else:
            record.update(divergence(references[key], logp, case.following))
        record["answers"] = ask(llm, case, questions[key], snapshot)
        record["heads"] = [head[:3] for head in llm.kv_rows()]
        return record

    with progress("measuring", len(missing), "cases") as bar:
        for setting in settings:
            for key in keys:
                bar.say(f"{setting}, {key[0]} tokens")
                if (setting, key) in missing:
                    if is_peer(setting):
                        load.close()  # its memory is wanted
                        run.record(
                            name_of(setting, key),
                            partial(peers.measure, setting, f"{key[0]}|{key[1]}", cases[key], questions[key]),
                        )
                    else:
                        run.record(name_of(setting, key), partial(measure, setting, key))
                    bar.advance()
                elif setting == BASE and any((s, key) in missing for s in settings if not is_peer(s)):
                    read_in(load(BASE), cases[key].tokens)
                    references[key] = follow(load(BASE), cases[key])


def text_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per setting and length: sums and means over the cases."""
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for name, record in run["records"].items():
        part, *key = name.split("|")
        if part == "text":
            groups.setdefault((key[0], int(key[1])), {})[key[2]] = record
    rows = []
    for (setting, n), cases in groups.items():
        records = list(cases.values())
        full = [
            r for case, r in groups.get((BASE, n), {}).items() if case in cases
        ]  # a run that was cut off has fewer of a setting
        answers = [a for r in records for a in r["answers"]]
        facts, facts_base = (
            sum(recalled(a["want"], a["got"]) for a in some)
            for some in (answers, [a for r in full for a in r["answers"]])
        )
        kl = [r["kl"] for r in records if "kl" in r]
        rows.append(
            {
                "setting": setting,
                "tokens": n,
                "facts": facts,
                "questions": len(answers),
                "of_full": facts / facts_base if facts_base else None,
                "kl": float(np.mean(kl)) if kl else None,
                "kl_least": min(kl, default=None),
                "kl_most": max(kl, default=None),
                "same_top": float(np.mean([r["same_top"] for r in records])) if kl else None,
                "ppl_factor": float(np.exp(np.mean([r["log_ppl"] for r in records]))) if kl else None,
                "kv_mib": records[0]["kv_bytes"] / 2**20,
                "prefill_tps": n / float(np.median([r["prefill_s"] for r in records])),
                "passes": sum(r["pass_s"] for r in records) / sum(r["prefill_s"] for r in records),
            }
        )
    return rows


def text_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of `text_rows`."""

    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    head = [
        "tokens",
        "cache",
        "facts",
        "of full",
        "KL (least to most)",
        "same top",
        "x perplexity",
        "KV MiB",
        "prefill t/s",
        "passes",
    ]
    cells = [
        [
            str(r["tokens"]),
            r["setting"],
            f"{r['facts']:.4g}/{r['questions']}",
            show(r["of_full"], ".0%"),
            "" if r["kl"] is None else f"{r['kl']:.4f} ({r['kl_least']:.4f} to {r['kl_most']:.4f})",
            show(r["same_top"], ".1%"),
            show(r["ppl_factor"], ".3f"),
            f"{r['kv_mib']:.1f}",
            f"{r['prefill_tps']:.0f}",
            show(r["passes"] or None, ".1%"),
        ]
        for r in text_rows(run)
    ]
    return head, cells


ROOM = 192
"""Tokens for a question and its answer."""


@click.command()
@model_argument
@text_option("Text to read from: facts in it, and what follows it.")
@click.option(
    "--n-tokens",
    "lengths",
    type=click.IntRange(min=64),
    multiple=True,
    default=(4000,),
    show_default=True,
    help="Length of a case; repeatable.",
)
@click.option(
    "--facts", "suite", type=click.Choice(sorted(SUITES)), default="single", show_default=True, help="Kinds of facts."
)
@click.option("--cases", "n_cases", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--first-case",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the first case; cases are reproducible by number.",
)
@click.option(
    "--n-following",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Following tokens for the KL divergence.",
)
@setting_option
@click.option(
    "--n-ctx",
    type=click.IntRange(min=1),
    help="Context size.  [default: the longest case and 512 or what follows, rounded up to 256]",
)
@gpu_layers_option
@threads_option
@click.option(
    "--kvpress-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar=KVPRESS_VARIABLE,
    help="A Python with kvpress, torch and gguf, for settings kvpress:NAME:KEEP and attention-matching:KEEP.  [env: "
    f"{KVPRESS_VARIABLE}]",
)
@json_option
def quality(
    model,
    text_path,
    lengths,
    suite,
    n_cases,
    first_case,
    n_following,
    settings,
    n_ctx,
    n_gpu_layers,
    threads,
    kvpress_python,
    json_path,
) -> None:
    """Facts asked for after compression, and KL divergence on the text that follows, against the uncompressed cache."""
    model_file = models.open_model(model)
    settings = with_base(settings or DEFAULT_SETTINGS)
    lengths = sorted(lengths)
    n_ctx = n_ctx or -(-(lengths[-1] + max(512, n_following)) // 256) * 256
    if n_ctx < lengths[-1] + max(ROOM, n_following):
        raise ArgumentError(
            f"--n-ctx: expected at least {lengths[-1] + max(ROOM, n_following)} for a case of {lengths[-1]} tokens and "
            f"what is asked of it, got {n_ctx}; raise it or leave it out"
        )
    for setting in filter(is_peer, settings):
        check_peer(model_file, setting)
    check_settings(model_file, [s for s in settings if not is_peer(s)], n_ctx)
    if kvpress_python is None and any(map(is_peer, settings)):
        raise ArgumentError(
            "--kvpress-python: expected a Python with kvpress, torch and gguf, got none; name one or set "
            f"{KVPRESS_VARIABLE}"
        )
    profiles = profiles_of(model_file, settings, threads)
    asked = {
        "model": model_file.name,
        "text": text_path.name,
        "lengths": lengths,
        "suite": suite,
        "n_cases": n_cases,
        "first_case": first_case,
        "n_following": n_following,
        "settings": settings,
        "n_ctx": n_ctx,
        "n_gpu_layers": n_gpu_layers,
        "threads": threads,
    }
    run = Run(json_path, "quality", asked, [model_file, text_path, *profiles])
    with (
        closing(Loader(model_file, context_options(n_ctx, threads, n_gpu_layers))) as load,
        Peers(kvpress_python, model_file) as peers,
    ):
        measure_texts(
            run,
            load,
            models.read_text(text_path),
            settings,
            lengths,
            range(first_case, first_case + n_cases),
            suite,
            n_following,
            peers,
        )
    print_table(
        f"{model_file.name}, {text_path.name}, n_ctx {n_ctx}, {count(n_cases, 'case')} each, facts: {suite}",
        *text_table(run.data),
    )

"""Tasks in the manner of LongBench: prompts of a JSONL file, greedy answers, the tasks' own metrics.

    llama-semanticache bench tasks MODEL --tasks items.jsonl --n-ctx 16384 --setting semanticache:0.25 --json tasks.json

A line of the file holds "task", "id", "prompt" and "gold" (a string or a list of them); of trec and lsht "gold" is an
object of "answers" (such a list) and "all_classes". Metrics and answer lengths are those of LongBench (Bai et al. 2023,
arXiv 2308.14508); as there, a prompt that is too long loses its middle, and it stands in the model's chat template
unless it is made of examples or code to go on with.
"""

from __future__ import annotations

import difflib
import json
import re
import string
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
from .harness import Loader, continue_greedily, read_in, render
from .options import gpu_layers_option, json_option, setting_option, threads_option, without_base_option
from .process import Worker
from .runs import Run
from .settings import BASE, DEFAULT_SETTINGS, check_settings, context_options, profiles_of, with_base
from .tables import print_table


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _characters(text: str) -> list[str]:
    """Numbers, Latin words, and all other letters one by one. LongBench splits Chinese into words (jieba); this moves
    the scores, but those of all caches alike.
    """
    return re.findall(r"[a-z0-9]+|[^\W_]", text.lower())


def f1(answer: str, gold: str, split: Callable[[str], list[str]] = _words) -> float:
    """Harmonic mean of precision and recall of the tokens, as a bag."""
    a, b = split(answer), split(gold)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def f1_zh(answer: str, gold: str) -> float:
    return f1(answer, gold, _characters)


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of ROUGE-L over sentences, by the package that LongBench takes; 0 for an answer without a word."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"]).get_scores(answer, gold)[0]["rouge-l"]["f"]
    except ValueError:  # it refuses texts without sentences
        return 0.0


def rouge_l_zh(answer: str, gold: str) -> float:
    return rouge_l(" ".join(_characters(answer)), " ".join(_characters(gold)))


def contains(answer: str, gold: str, classes: Sequence[str]) -> float:
    """Classification: the label stands in the answer; divided by how many do, but those that are part of it."""
    found = {c for c in classes if c in answer and (c == gold or c not in gold)}
    return float(gold in found) / max(len(found), 1)


def numbers(answer: str, gold: str) -> float:
    """Retrieval and counting: share of the answer's numbers that are the right one."""
    found, wanted = re.findall(r"\d+", answer), re.findall(r"\d+", gold)
    return sum(n == wanted[0] for n in found) / len(found) if found and wanted else 0.0


def edit_similarity(answer: str, gold: str) -> float:
    """Code: similarity of the answer's first line of code."""
    lines = [line for line in answer.lstrip("\n").split("\n") if not any(c in line for c in ("`", "#", "//"))]
    return difflib.SequenceMatcher(None, lines[0] if lines else "", gold, autojunk=False).ratio()


FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
"""Few-shot tasks: what comes behind the answer's first line is the next example."""

PLAIN = FIRST_LINE | {"lcc", "repobench-p"}
"""Tasks whose prompt the model goes on with, outside its chat template."""

TASKS: dict[str, tuple[Callable[..., float], int]] = {
    # task: (metric, tokens of an answer)
    "narrativeqa": (f1, 128),
    "qasper": (f1, 128),
    "multifieldqa_en": (f1, 64),
    "multifieldqa_zh": (f1_zh, 64),
    "hotpotqa": (f1, 32),
    "2wikimqa": (f1, 32),
    "musique": (f1, 32),
    "dureader": (rouge_l_zh, 128),
    "gov_report": (rouge_l, 512),
    "qmsum": (rouge_l, 512),
    "multi_news": (rouge_l, 512),
    "vcsum": (rouge_l_zh, 512),
    "trec": (contains, 64),
    "triviaqa": (f1, 32),
    "samsum": (rouge_l, 128),
    "lsht": (contains, 64),
    "passage_retrieval_en": (numbers, 32),
    "passage_count": (numbers, 32),
    "passage_retrieval_zh": (numbers, 32),
    "lcc": (edit_similarity, 64),
    "repobench-p": (edit_similarity, 64),
}


def score(task: str, answer: str, gold: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The task's metric, of the best of its gold answers."""
    if task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = TASKS[task][0]
    return max(contains(answer, g, classes) if metric is contains else metric(answer, g) for g in gold)


def cut_middle(tokens: Sequence[int], n: int) -> list[int]:
    """The first and the last n/2 of more than n tokens."""
    return list(tokens) if len(tokens) <= n else [*tokens[: n // 2], *tokens[len(tokens) - (n - n // 2) :]]


def fault(item: Any) -> str:
    """What an item of the file has instead of what it should have; empty if it is one."""

    def are_texts(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)

    if not isinstance(item, dict):
        return "no JSON object"
    missing = {"task", "id", "prompt", "gold"} - item.keys()
    if missing:
        return f"no {', '.join(sorted(missing))}"
    if not isinstance(item["task"], str) or item["task"] not in TASKS:
        return f"the task {item['task']!r}"
    if not isinstance(item["id"], (str, int)) or "|" in str(item["id"]):
        return f"the id {item['id']!r}"
    if not isinstance(item["prompt"], str) or not item["prompt"]:
        return f"the prompt {item['prompt']!r}"
    gold = item["gold"]
    if TASKS[item["task"]][0] is contains:
        good = isinstance(gold, dict) and are_texts(gold.get("answers")) and are_texts(gold.get("all_classes"))
    else:
        good = are_texts([gold] if isinstance(gold, str) else gold)
    return "" if good else f"the gold {gold!r}"


def read_items(path: Path) -> list[dict[str, Any]]:
    """The file's items, checked; "gold" is a list, and "all_classes" one that is empty where the task has none."""
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for number, line in enumerate(models.read_text(path).rstrip("\n").split("\n"), 1):
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        got = fault(item)
        if not got and (item["task"], str(item["id"])) in items:
            got = f"a second {item['task']} of the id {item['id']!r}"
        if got:
            raise ArgumentError(
                f"{path}, line {number}: expected a task of {', '.join(TASKS)}, an id without |, a prompt, and gold "
                f"(a text or a list of them; of trec and lsht an object of answers and all_classes), got {got}; "
                "correct the line"
            )
        gold = item["gold"]
        answers, classes = (
            (gold["answers"], gold["all_classes"])
            if isinstance(gold, dict)
            else ([gold] if isinstance(gold, str) else gold, [])
        )
        items[item["task"], str(item["id"])] = {**item, "gold": answers, "all_classes": classes}
    return list(items.values())


def template_frame(llm: Any) -> tuple[list[int], list[int]]:
    """Tokens before and behind a message in the model's chat template; what begins a text, and none, if it has none."""
    if "tokenizer.chat_template" not in llm.metadata:
        return llm.tokenize(b"", special=False), []
    a, b = (render(llm, [{"role": "user", "content": word}], prompt=True) for word in "ab")
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    if len(a) != len(b) or len(differ) != 1:
        raise ArgumentError(
            "model: expected a chat template that leaves a message as it is, got another; take another model"
        )
    return a[: differ[0]], a[differ[0] + 1 :]


def fit(
    llm: Any, items: Sequence[dict[str, Any]], n_ctx: int, whole: bool, least: int = 0, most: int | None = None
) -> list[tuple[dict[str, Any], list[int]]]:
    """Items and the tokens of their prompts, the shortest first; what leaves no room for the answer loses its middle,
    or is left out if it must be `whole`. So is what has fewer than `least` tokens or more than `most`.
    """
    framed = template_frame(llm)
    plain: tuple[list[int], list[int]] = llm.tokenize(b"", special=False), []
    prompts = []
    for item in items:
        before, behind = plain if item["task"] in PLAIN else framed
        body = llm.tokenize(item["prompt"].encode(), add_bos=False, special=False)
        n = n_ctx - TASKS[item["task"]][1] - len(before) - len(behind)
        if not whole or len(body) <= n:
            prompts.append((item, [*before, *cut_middle(body, n), *behind]))
    return sorted(
        (prompt for prompt in prompts if least <= len(prompt[1]) <= (most or n_ctx)), key=lambda prompt: len(prompt[1])
    )


class Answerers(ExitStack):
    """Processes that answer items, one per thread that asks; each holds the model with one cache at a time."""

    def __init__(self, path: Path, common: Mapping[str, Any]):
        super().__init__()
        self.path, self.common = path, common
        self.of_thread = threading.local()

    def answer(self, setting: str, item: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        if not hasattr(self.of_thread, "worker"):
            worker = self.enter_context(
                Worker("tasks", [sys.executable, "-c", f"from {__name__} import serve; serve()"])
            )
            worker.ask(model=str(self.path), common=self.common)
            self.of_thread.worker = worker
        return self.of_thread.worker.ask(setting=setting, item=item, tokens=tokens)


def serve() -> None:
    """`Loader`'s arguments in the first line of standard input, and `answer_item`'s in each of the others."""
    orders = map(json.loads, sys.stdin)
    with closing(Loader(**next(orders))) as load:
        print("{}", flush=True)
        for order in orders:
            print(json.dumps(answer_item(load(order["setting"]), order["item"], order["tokens"])), flush=True)


def measure(
    run: Run,
    path: Path,
    common: Mapping[str, Any],
    prompts: Sequence[tuple[dict[str, Any], list[int]]],
    settings: Sequence[str],
    jobs: int,
) -> None:
    """Records "task|SETTING|TASK|ID" of items and their prompts, all settings of an item one after the other; `jobs` at
    a time.
    """
    names = {
        f"task|{setting}|{item['task']}|{item['id']}": (setting, item, tokens)
        for item, tokens in prompts
        for setting in settings
    }
    missing = {name: order for name, order in names.items() if name not in run.records}
    with (
        ThreadPoolExecutor(jobs) as threads,
        Answerers(path, common) as answerers,
        progress("measuring", len(names), "items", done=len(names) - len(missing)) as bar,
    ):
        answers = {threads.submit(answerers.answer, *order): name for name, order in missing.items()}
        try:
            for answer in as_completed(answers):
                record = answer.result()
                bar.say(f"{answers[answer]}, {record['tokens']} tokens")
                run.record(answers[answer], partial(dict, record))
                bar.advance()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def answer_item(llm: Any, item: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """The model's answer and its score."""
    record = read_in(llm, tokens[:-1])
    got = continue_greedily(
        llm, tokens[-1:], TASKS[item["task"]][1], lambda text: item["task"] in FIRST_LINE and "\n" in text.strip("\n")
    )
    return {
        **record,
        "tokens": len(tokens),
        "got": got,
        "score": score(item["task"], got, item["gold"], item["all_classes"]),
    }


def task_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Means by task and by length of the prompt, and over all items; scores of 100. Items that one of the caches has
    not answered do not count.
    """
    by_item: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, record in run["records"].items():
        part, setting, task, number = name.split("|")
        if part == "task":
            by_item.setdefault((task, number), {})[setting] = record
    settings = [s for s in run["asked"]["settings"] if any(s in records for records in by_item.values())]
    answered = {item: records for item, records in by_item.items() if records.keys() >= set(settings)}
    if not answered:
        return ["task", "items", *settings], []

    def means(name: str, some: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
        return [
            name,
            str(len(some)),
            *(f"{100 * np.mean([records[s]['score'] for records in some]):.1f}" for s in settings),
        ]

    groups: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for (task, _), records in sorted(answered.items()):
        groups.setdefault(task, []).append(records)
    for records in sorted(answered.values(), key=lambda records: records[settings[0]]["tokens"]):
        bits = (records[settings[0]]["tokens"] - 1).bit_length()
        groups.setdefault(f"{2 ** (bits - 1) + 1 if bits else 1} to {2**bits} tokens", []).append(records)
    everything = list(answered.values())
    cells = [means(name, some) for name, some in groups.items()]
    cells.append(means("all items", everything))
    if BASE in settings:
        base = np.mean([records[BASE]["score"] for records in everything])
        cells.append(
            [
                "of uncompressed",
                "",
                *(
                    f"{np.mean([records[s]['score'] for records in everything]) / base:.1%}" if base else ""
                    for s in settings
                ),
            ]
        )
        cells.append(["95% interval", "", *(of_base(everything, s) for s in settings)])
    cells.append(["KV MiB", "", *(f"{everything[-1][s]['kv_bytes'] / 2**20:.1f}" for s in settings)])
    return ["task", "items", *settings], cells


def of_base(items: Sequence[dict[str, dict[str, Any]]], setting: str) -> str:
    """Bootstrap interval, over the items, of a cache's share of the uncompressed score."""
    scores = np.array([[records[s]["score"] for s in (setting, BASE)] for records in items])
    again = np.random.default_rng(0).integers(len(items), size=(10000, len(items)))
    ours, base = scores[again].mean(axis=1).T
    scored = base > 0
    least, most = np.quantile(ours[scored] / base[scored], (0.025, 0.975)) if scored.any() else (np.nan, np.nan)
    return f"{least:.0%} to {most:.0%}"


@click.command()
@model_argument
@click.option(
    "--tasks",
    "tasks_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL file: task, id, prompt, gold.",
)
@click.option("--n-ctx", type=click.IntRange(min=1024), default=16384, show_default=True)
@click.option("--whole", is_flag=True, help="Leave out items that do not fit instead of cutting their middle out.")
@click.option("--min-tokens", type=click.IntRange(min=0), default=0, help="Leave out items with a shorter prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Leave out items with a longer prompt.")
@setting_option
@without_base_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Items at a time, each in a process with --threads of its own.",
)
@gpu_layers_option
@threads_option
@json_option
def tasks(
    model,
    tasks_path,
    n_ctx,
    whole,
    min_tokens,
    max_tokens,
    settings,
    without_base,
    jobs,
    n_gpu_layers,
    threads,
    json_path,
) -> None:
    """LongBench-style tasks from a file, with the tasks' own metrics."""
    model_file = models.open_model(model)
    settings = with_base(settings or DEFAULT_SETTINGS, without_base)
    check_settings(model_file, settings, n_ctx)
    items = read_items(tasks_path)
    profiles = profiles_of(model_file, settings, threads)
    run = Run(
        json_path,
        "tasks",
        {
            "model": model_file.name,
            "tasks": tasks_path.name,
            "n_ctx": n_ctx,
            "whole": whole,
            "min_tokens": min_tokens,
            "max_tokens": max_tokens,
            "settings": settings,
            "jobs": jobs,
            "n_gpu_layers": n_gpu_layers,
            "threads": threads,
        },
        [model_file, tasks_path, *profiles],
    )
    common = context_options(n_ctx, threads, n_gpu_layers)
    with closing(Loader(model_file, common)) as load:
        prompts = fit(load(BASE), items, n_ctx, whole, min_tokens, max_tokens)
    if not prompts:
        lengths = f"at least {min_tokens} tokens" + (f" and at most {max_tokens}" if max_tokens else "")
        raise ArgumentError(
            f"{tasks_path}: expected items whose prompts fit --n-ctx {n_ctx} and have {lengths}, got none of "
            f"{len(items)}; ask for other lengths"
        )
    measure(run, model_file.path, common, prompts, settings, jobs)
    left_out = (
        f", without {len(items) - len(prompts)} of {len(items)} items for their length"
        if len(prompts) < len(items)
        else ""
    )
    print_table(f"{model_file.name}, {tasks_path.name}, n_ctx {n_ctx}{left_out}", *task_table(run.data))

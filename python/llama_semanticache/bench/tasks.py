"""Tasks in the manner of LongBench: prompts of a JSONL file, greedy answers, the tasks' own metrics.

    llama-semanticache bench tasks MODEL --tasks items.jsonl --n-ctx 16384 --setting semanticache:0.25 --json tasks.json

A line of the file holds "task", "id", "prompt" and "gold" (a string or a list of them), of classification perhaps
"all_classes". Metrics and answer lengths are those of LongBench (Bai et al. 2023, arXiv 2308.14508); as there, a prompt that is
too long loses its middle, and it stands in the model's chat template unless it is made of examples or code to go on with.
"""

from __future__ import annotations

import difflib
import json
import re
import string
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Sequence

import click
import numpy as np

from .. import models
from ..errors import ArgumentError
from .harness import Loader, continue_greedily, read_in, render
from .options import json_option, setting_option, threads_option
from .runs import Run
from .settings import BASE, DEFAULT_SETTINGS, context_options, llama_options, profiles_of, with_base
from .tables import print_table


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _characters(text: str) -> list[str]:
    """Letters and digits one by one: Chinese is not split into words here, which moves its scores, but those of all caches alike."""
    return [c for c in text.lower() if c.isalnum()]


def f1(answer: str, gold: str, split: Callable[[str], list[str]] = _words) -> float:
    """Harmonic mean of precision and recall of the tokens, as a bag."""
    a, b = split(answer), split(gold)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def f1_zh(answer: str, gold: str) -> float:
    return f1(answer, gold, _characters)


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words."""
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"]).score(gold, answer)["rougeL"].fmeasure


def rouge_l_zh(answer: str, gold: str) -> float:
    from rouge_score import rouge_scorer

    class Tokenizer:
        @staticmethod
        def tokenize(text: str) -> list[str]:
            return _characters(text)

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Tokenizer()).score(gold, answer)["rougeL"].fmeasure


def contains(answer: str, gold: str, classes: Sequence[str] = ()) -> float:
    """Classification: the label stands in the answer's first line; divided by how many do, but those that are part of it."""
    line = answer.strip().split("\n")[0]
    found = {c for c in (*classes, gold) if c in line and (c == gold or c not in gold)}
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

TASKS: dict[str, tuple[Callable[[str, str], float], int]] = {
    # task: (metric, tokens of an answer)
    "narrativeqa": (f1, 128), "qasper": (f1, 128), "multifieldqa_en": (f1, 64), "multifieldqa_zh": (f1_zh, 64), "hotpotqa": (f1, 32),
    "2wikimqa": (f1, 32), "musique": (f1, 32), "dureader": (rouge_l_zh, 128), "gov_report": (rouge_l, 512), "qmsum": (rouge_l, 512),
    "multi_news": (rouge_l, 512), "vcsum": (rouge_l_zh, 512), "trec": (contains, 64), "triviaqa": (f1, 32), "samsum": (rouge_l, 128),
    "lsht": (contains, 64), "passage_retrieval_en": (numbers, 32), "passage_count": (numbers, 32), "passage_retrieval_zh": (numbers, 32),
    "lcc": (edit_similarity, 64), "repobench-p": (edit_similarity, 64),
}  # fmt: skip


def score(task: str, answer: str, gold: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The task's metric, of the best of its gold answers."""
    if task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = TASKS[task][0]
    return max(contains(answer, g, classes) if metric is contains else metric(answer, g) for g in gold)


def cut_middle(tokens: Sequence[int], n: int) -> list[int]:
    """The first and the last n/2 of more than n tokens."""
    return list(tokens) if len(tokens) <= n else [*tokens[: n // 2], *tokens[len(tokens) - (n - n // 2) :]]


def read_items(path: Path) -> list[dict[str, Any]]:
    """The file's items, checked."""
    items = []
    for number, line in enumerate(models.read_text(path).rstrip("\n").split("\n"), 1):
        try:
            item = json.loads(line)
            got = f"no {', '.join(sorted({'task', 'id', 'prompt', 'gold'} - item.keys()))}"
        except (ValueError, AttributeError):
            item, got = {}, "no JSON object"
        if got == "no ":
            got = "" if item["task"] in TASKS and item["prompt"] and item["gold"] else f"task {item['task']!r}, a prompt of {len(item['prompt'])} characters, gold {item['gold']!r}"
        if not got and "|" in str(item["id"]):
            got = f"an id with | in it, {item['id']!r}"
        if not got and (item["task"], str(item["id"])) in {(i["task"], str(i["id"])) for i in items}:
            got = f"a second {item['task']} of the id {item['id']!r}"
        if got:
            raise ArgumentError(f"{path}, line {number}: expected task, id, prompt and gold of one of {', '.join(TASKS)}, got {got}; mend the line")
        items.append({**item, "gold": [item["gold"]] if isinstance(item["gold"], str) else list(item["gold"])})
    return items


def template_frame(llm: Any) -> tuple[list[int], list[int]]:
    """Tokens before and behind a message in the model's chat template; what begins a text, and none, if it has none."""
    if "tokenizer.chat_template" not in llm.metadata:
        return llm.tokenize(b"", special=False), []
    a, b = (render(llm, [{"role": "user", "content": word}], prompt=True) for word in "ab")
    differ = [i for i, (x, y) in enumerate(zip(a, b)) if x != y]
    if len(a) != len(b) or len(differ) != 1:
        raise ArgumentError("model: expected a chat template that leaves a message as it is, got another; take another model")
    return a[: differ[0]], a[differ[0] + 1 :]


def fit(llm: Any, items: Sequence[dict[str, Any]], n_ctx: int, whole: bool, least: int = 0) -> list[tuple[dict[str, Any], list[int]]]:
    """Items and the tokens of their prompts, the shortest first; what leaves no room for the answer loses its middle, or is left
    out if it must be `whole`. So is what has fewer than `least` tokens.
    """
    framed = template_frame(llm)
    plain = llm.tokenize(b"", special=False), []
    prompts = []
    for item in items:
        before, behind = plain if item["task"] in PLAIN else framed
        body = llm.tokenize(item["prompt"].encode(), add_bos=False, special=False)
        n = n_ctx - TASKS[item["task"]][1] - len(before) - len(behind)
        if not whole or len(body) <= n:
            prompts.append((item, [*before, *cut_middle(body, n), *behind]))
    return sorted((prompt for prompt in prompts if len(prompt[1]) >= least), key=lambda prompt: len(prompt[1]))


def measure(run: Run, load: Any, prompts: Sequence[tuple[dict[str, Any], list[int]]], settings: Sequence[str]) -> None:
    """Records "task|SETTING|TASK|ID" of items and their prompts, all settings of an item one after the other."""
    from tqdm import tqdm

    with tqdm(total=len(prompts) * len(settings), unit="item") as bar:
        for item, tokens in prompts:
            for setting in settings:
                name = f"task|{setting}|{item['task']}|{item['id']}"
                bar.set_postfix_str(f"{item['task']} of {len(tokens)} tokens, {setting}")
                if name not in run.records:
                    run.record(name, lambda: answer_item(load(setting), item, tokens))
                bar.update()


def answer_item(llm: Any, item: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """The model's answer and its score."""
    record = read_in(llm, tokens[:-1])
    got = continue_greedily(llm, tokens[-1:], TASKS[item["task"]][1], lambda text: item["task"] in FIRST_LINE and "\n" in text.strip("\n"))
    return {**record, "tokens": len(tokens), "got": got, "score": score(item["task"], got, item["gold"], item.get("all_classes") or ())}


def task_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Means by task and by length of the prompt, and the mean over all items; scores of 100."""
    scores: dict[str, dict[str, list[float]]] = {}
    lengths: dict[int, dict[str, list[float]]] = {}
    kv_bytes: dict[str, int] = {}
    for name, record in run["records"].items():
        part, setting, task, _ = name.split("|")
        if part == "task":
            for some in (scores.setdefault(task, {}), lengths.setdefault((record["tokens"] - 1).bit_length(), {})):
                some.setdefault(setting, []).append(100 * record["score"])
            kv_bytes[setting] = record["kv_bytes"]
    settings = [s for s in run["asked"]["settings"] if s in kv_bytes]
    everything = {s: [x for by_setting in scores.values() for x in by_setting.get(s, [])] for s in settings}
    base = np.mean(everything[BASE]) if everything.get(BASE) else None

    def means(name: str, by: dict[str, list[float]]) -> list[str]:
        return [name, str(len(by.get(BASE, []))), *(f"{np.mean(by[s]):.1f}" if s in by else "" for s in settings)]

    cells = [means(task, by) for task, by in sorted(scores.items())]
    cells += [means(f"{2 ** (bits - 1) + 1 if bits else 1} to {2**bits} tokens", by) for bits, by in sorted(lengths.items())]
    cells.append(means("all items", everything))
    cells.append(["of uncompressed", "", *(f"{np.mean(everything[s]) / base:.1%}" if base else "" for s in settings)])
    cells.append(["KV MiB", "", *(f"{kv_bytes[s] / 2**20:.1f}" for s in settings)])
    return ["task", "items", *settings], cells


@click.command()
@click.argument("model")
@click.option("--tasks", "tasks_path", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSONL file: task, id, prompt, gold.")
@click.option("--n-ctx", type=click.IntRange(min=1024), default=16384, show_default=True)
@click.option("--whole", is_flag=True, help="Leave out items that do not fit instead of cutting their middle out.")
@click.option("--min-tokens", type=click.IntRange(min=0), default=0, help="Leave out items with a shorter prompt.")
@setting_option
@threads_option
@json_option
def tasks(model, tasks_path, n_ctx, whole, min_tokens, settings, threads, json_path) -> None:
    """LongBench-style tasks from a file, with the tasks' own metrics."""
    path = models.resolve(model)
    settings = with_base(settings or DEFAULT_SETTINGS)
    for setting in settings:
        llama_options(setting)
    items = read_items(tasks_path)
    profiles = profiles_of(path, settings, threads)
    run = Run(json_path, "tasks", {
        "model": path.name, "tasks": tasks_path.name, "n_ctx": n_ctx, "whole": whole, "min_tokens": min_tokens, "settings": settings, "threads": threads,
    }, [path, tasks_path, *profiles])  # fmt: skip
    with closing(Loader(path, context_options(n_ctx, threads))) as load:
        prompts = fit(load(BASE), items, n_ctx, whole, min_tokens)
        if not prompts:
            raise ArgumentError(f"{tasks_path}: expected items whose prompts fit --n-ctx {n_ctx} and have at least {min_tokens} tokens, got none of {len(items)}; raise the one or lower the other")
        measure(run, load, prompts, settings)
    left_out = f", without {len(items) - len(prompts)} of {len(items)} items for their length" if len(prompts) < len(items) else ""
    print_table(f"{path.name}, {tasks_path.name}, n_ctx {n_ctx}{left_out}", *task_table(run.data))

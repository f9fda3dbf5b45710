"""Does the model still remember? Facts asked for after compression, and KL divergence on the text that follows.

    python -m llama_semanticache.bench.quality MODEL --text FILE --n-tokens 8000 --cases 3 --json results.json

Every case is read with the uncompressed cache and with each setting; the questions and the following text come after the
whole case has been read (and compressed), each from the same snapshot of the cache.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import models, profile, upstream_commit
from ..llama import Llama
from .cases import Case, make_case
from .settings import parse_setting

import llama_cpp  # the patched library is loaded by now

FULL = "full"


@dataclass
class Outcome:
    """Sums over the cases of one setting."""

    setting: str
    answers: list[dict[str, Any]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # nats, mean over the following tokens, per case
    same_top: list[float] = field(default_factory=list)  # share of following tokens with the same most likely token
    prefill_s: list[float] = field(default_factory=list)
    pass_s: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    rows_used: int = 0

    @property
    def exact_match(self) -> float:
        return float(np.mean([a["match"] for a in self.answers]))


def next_logits(llm: Llama, tokens: list[int]) -> np.ndarray:
    """Logits after each of `tokens`, [len(tokens), n_vocab]; at most n_batch tokens."""
    llm._batch.set_batch(batch=tokens, n_past=llm.n_tokens, logits_all=True)
    llm._ctx.decode(llm._batch)
    llm.input_ids[llm.n_tokens : llm.n_tokens + len(tokens)] = tokens
    llm.n_tokens += len(tokens)
    shape = (len(tokens), llm.n_vocab())
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=shape).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Snapshot:
    """The whole context, to come back to."""

    def __init__(self, llm: Llama):
        size = llama_cpp.llama_state_get_size(llm.ctx)
        self.data = (llama_cpp.ctypes.c_uint8 * size)()
        self.size = llama_cpp.llama_state_get_data(llm.ctx, self.data, size)
        self.n_tokens = llm.n_tokens

    def restore(self, llm: Llama) -> None:
        if llama_cpp.llama_state_set_data(llm.ctx, self.data, self.size) != self.size:
            raise RuntimeError("could not restore the context")
        llm.n_tokens = self.n_tokens


def answer(llm: Llama, prompt: str, n_tokens: int) -> str:
    """Greedy continuation of the cache's text by the prompt."""
    tokens = llm.tokenize(prompt.encode(), add_bos=False, special=False)
    out: list[int] = []
    while len(out) < n_tokens:
        top = int(next_logits(llm, tokens)[-1].argmax())
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, top):
            break
        out.append(top)
        tokens = [top]
    return llm.detokenize(out).decode("utf-8", "ignore")


def run_case(llm: Llama, case: Case, outcome: Outcome, reference: np.ndarray | None) -> np.ndarray:
    """Measures one case into `outcome`; returns the log-probabilities on the following text."""
    llm.reset()
    before = llm.kv_stats().pass_s
    start = time.perf_counter()
    llm.eval(case.tokens)
    outcome.prefill_s.append(time.perf_counter() - start)
    stats = llm.kv_stats()
    outcome.pass_s.append(stats.pass_s - before)
    outcome.kv_bytes, outcome.rows_used = stats.total_bytes, stats.rows_used

    snapshot = Snapshot(llm)
    step = min(128, llm.n_batch)
    logp = log_softmax(np.concatenate([next_logits(llm, case.following[i : i + step]) for i in range(0, len(case.following), step)]))
    if reference is not None:
        outcome.kl.append(float((np.exp(reference) * (reference - logp)).sum(-1).mean()))
        outcome.same_top.append(float((reference.argmax(-1) == logp.argmax(-1)).mean()))
    for fact in case.facts:
        snapshot.restore(llm)
        n = len(llm.tokenize(fact.answer.encode(), add_bos=False, special=False)) + 2
        text = answer(llm, fact.prompt, n)
        match = text.strip().startswith(fact.answer)
        outcome.answers.append({"kind": fact.kind, "depth": fact.depth, "want": fact.answer, "got": text, "match": match})
    return logp


@click.command()
@click.argument("model")
@click.option("--text", "text_path", required=True, type=click.Path(exists=True, dir_okay=False), help="Text to read from.")
@click.option("--n-tokens", default=4000, show_default=True, help="Length of a case.")
@click.option("--n-ctx", default=None, type=int, help="Context size; by default n-tokens + 512, rounded up to 256.")
@click.option("--cases", "n_cases", default=3, show_default=True)
@click.option("--first-case", default=0, show_default=True, help="Number of the first case; cases are reproducible by number.")
@click.option("--setting", "settings", multiple=True, help="METHOD:RATIO[:equal][:stage=N]...; repeatable.")
@click.option("--n-following", default=256, show_default=True, help="Following tokens for the KL divergence.")
@click.option("--threads", default=None, type=int)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write everything that was measured.")
def main(model, text_path, n_tokens, n_ctx, n_cases, first_case, settings, n_following, threads, json_path) -> None:
    """Exact match on facts and KL divergence, each setting against the uncompressed cache of the same build."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    path = models.resolve(model)
    settings = settings or ("semanticache:0.25", "semanticache:0.125", "paper:0.25", "streaming:0.25")
    n_ctx = n_ctx or -(-(n_tokens + 512) // 256) * 256
    common = dict(n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, flash_attn=True, swa_full=False, verbose=False)
    if any(s.startswith("semanticache") for s in settings):
        profile.ensure(path, n_threads=threads)

    outcomes = [Outcome(FULL)] + [Outcome(s) for s in settings]
    full = Llama(str(path), **common)
    text = full.tokenize(Path(text_path).read_text(encoding="utf-8").encode(), add_bos=False, special=False)
    cases = [make_case(full, text, first_case + i, n_tokens, n_following) for i in range(n_cases)]
    references: list[np.ndarray] = []
    with tqdm(total=n_cases * len(outcomes), unit="run") as bar:
        for outcome in outcomes:
            bar.set_postfix_str(outcome.setting)
            llm = full if outcome.setting == FULL else Llama(str(path), **common, **parse_setting(outcome.setting)[1])
            for i, case in enumerate(cases):
                logp = run_case(llm, case, outcome, references[i] if outcome.setting != FULL else None)
                if outcome.setting == FULL:
                    references.append(logp)
                matches = sum(a["match"] for a in outcome.answers)
                kl = f", KL {np.mean(outcome.kl):.4f}" if outcome.kl else ""
                bar.write(f"{outcome.setting}: case {first_case + i}: {matches}/{len(outcome.answers)} facts so far{kl}")
                bar.update()
            llm.close()

    table = Table(title=f"{path.name}, {n_tokens} tokens, n_ctx {n_ctx}, {n_cases} cases, {Path(text_path).name}")
    for column in ("cache", "facts", "of full", "KL", "same top", "KV MiB", "x smaller", "prefill t/s", "passes"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    base = outcomes[0]
    for o in outcomes:
        seconds = float(np.median(o.prefill_s))
        table.add_row(
            o.setting, f"{sum(a['match'] for a in o.answers)}/{len(o.answers)}",
            f"{o.exact_match / base.exact_match:.0%}" if base.exact_match else "-",
            f"{np.mean(o.kl):.4f}" if o.kl else "", f"{np.mean(o.same_top):.1%}" if o.same_top else "",
            f"{o.kv_bytes / 2**20:.1f}", f"{base.kv_bytes / o.kv_bytes:.2f}", f"{n_tokens / seconds:.0f}",
            f"{sum(o.pass_s) / sum(o.prefill_s):.1%}",
        )  # fmt: skip
    Console(width=120).print(table)
    if json_path:
        record = {
            "model": path.name, "text": Path(text_path).name, "n_tokens": n_tokens, "n_ctx": n_ctx, "n_cases": n_cases,
            "first_case": first_case, "n_following": n_following, "threads": threads, "machine": platform.processor() or platform.machine(),
            "upstream_commit": upstream_commit(), "outcomes": [asdict(o) for o in outcomes],
        }  # fmt: skip
        Path(json_path).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

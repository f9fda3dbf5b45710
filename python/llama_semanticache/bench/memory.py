"""How much memory? What llama.cpp and ours allocate for the KV cache, and what the process holds, for every kind of
cache.

    llama-semanticache bench memory MODEL --n-ctx 8192 --n-ctx 32768 --setting semanticache:0.25 --json memory.json

Every setting has a process of its own, which fills its cache with random tokens. The largest context of a number of GiB
comes from the formula that `llama-semanticache memory` uses, which the tests hold to llama.cpp's allocation.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from .. import models
from .._progress import progress
from ..cli.common import model_argument
from ..config import OURS
from ..memory import largest_n_ctx
from ..shape import ModelShape
from .cards import card_bytes
from .options import gpu_layers_option, json_option, setting_option, threads_option
from .process import Worker
from .runs import Run
from .settings import (
    BASE,
    STOCK,
    check_settings,
    context_options,
    llama_options,
    parse_setting,
    profiles_of,
    with_base,
)
from .tables import print_table
from .worker import resident_bytes

DEFAULT_SETTINGS = (*STOCK, "semanticache:0.25", "semanticache:0.125", "semanticache:0.25:type_k=f16:type_v=f16")


class PeakResident:
    """The most that this process holds while it is entered, `bytes`: a thread looks every two milliseconds, since a
    pass takes and gives back its working memory inside one call.
    """

    def __enter__(self) -> PeakResident:
        self.bytes, self.done = resident_bytes(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, resident_bytes())

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())


def fill(options: dict[str, Any], fraction: float) -> dict[str, Any]:
    """Loads a model, reads random tokens into the cache and tells what that took; runs in a process of its own."""
    import numpy as np

    from ..llama import Llama

    before, card = resident_bytes(), card_bytes()
    llm = Llama(**options)
    loaded = resident_bytes()
    n = int(fraction * llm.n_ctx())
    tokens = np.random.RandomState(0).randint(100, llm.n_vocab() - 100, n).tolist()
    with PeakResident() as peak:
        llm.eval(tokens)
    stats, card_after, steady = llm.kv_stats(), card_bytes(), resident_bytes()
    return {
        "n_tokens": n,
        "kv_bytes": stats.total_bytes,
        "core_bytes": stats.core_bytes,
        "stage_bytes": stats.stage_bytes,
        "query_bytes": stats.query_bytes,
        "meta_bytes": stats.meta_bytes,
        "work_bytes": stats.work_bytes,
        "resident_loaded": loaded - before,
        "resident_steady": steady - before,
        "resident_peak": max(peak.bytes, steady) - before,
        "card_bytes": None if card is None or card_after is None else card_after - card,
    }


def serve() -> None:
    """`fill` with the arguments of a line of JSON on standard input."""
    print(json.dumps(fill(**json.loads(sys.stdin.readline()))), flush=True)


def measure(
    options: dict[str, Any], fraction: float, setting: str, shape: ModelShape, gibs: Sequence[float]
) -> dict[str, Any]:
    """`fill` in a new process, and the largest context for so many GiB each."""
    with Worker(setting, [sys.executable, "-c", f"from {__name__} import serve; serve()"]) as worker:
        record = worker.ask(options=options, fraction=fraction)
    return {**record, "largest": [largest_tokens(shape, setting, gib) for gib in gibs]}


def largest_tokens(shape: ModelShape, setting: str, gib: float) -> int:
    """Largest context whose cache, weights and buffers fit, at most what the model was trained for; 0 if none does."""
    if setting in STOCK:
        return largest_n_ctx(shape, gib, STOCK[setting])
    return largest_n_ctx(shape, gib, OURS, **parse_setting(setting))


def _mib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**20:.1f}"


def memory_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """MiB as allocated and as resident, and the largest contexts."""
    gibs = run["asked"]["gibs"]
    head = [
        "n_ctx",
        "cache",
        "KV MiB",
        "of f16",
        "cores",
        "stage",
        "queries",
        "meta",
        "work",
        "other",
        "resident MiB after loading",
        "after tokens",
        "of them",
        "peak",
        "card MiB",
        *(f"tokens in {g:g} GiB" for g in gibs),
    ]
    cells = []
    for name, r in run["records"].items():
        _, setting, n_ctx = name.split("|")
        base = run["records"].get(f"memory|{BASE}|{n_ctx}", r)

        ours = [r[key] for key in ("core_bytes", "stage_bytes", "query_bytes", "meta_bytes")]
        ours.append(r.get("work_bytes", 0))  # not in files of earlier versions
        parts = [f"{n / 2**20:.1f}" if r["core_bytes"] else "" for n in (*ours, r["kv_bytes"] - sum(ours))]
        resident = [
            _mib(r["resident_loaded"]),
            str(r["n_tokens"]),
            *(_mib(r[key]) for key in ("resident_steady", "resident_peak", "card_bytes")),
        ]
        cells.append(
            [
                n_ctx,
                setting,
                _mib(r["kv_bytes"]),
                f"{r['kv_bytes'] / base['kv_bytes']:.1%}",
                *parts,
                *resident,
                *(f"{n:,}" for n in r["largest"]),
            ]
        )
    return head, cells


@click.command()
@model_argument
@click.option(
    "--n-ctx",
    "sizes",
    type=click.IntRange(min=1024),
    multiple=True,
    default=(8192,),
    show_default=True,
    help="Context size; repeatable.",
)
@setting_option
@click.option(
    "--fill",
    "fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of the context that is read.",
)
@click.option(
    "--gib",
    "gibs",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(4, 8),
    show_default=True,
    help="Memory to find the largest context for; repeatable.",
)
@gpu_layers_option
@threads_option
@json_option
def memory(model, sizes, settings, fraction, gibs, n_gpu_layers, threads, json_path) -> None:
    """KV bytes as allocated, resident size of a process that fills its cache, and the largest context that fits."""
    model_file = models.open_model(model)
    shape = model_file.shape
    settings = with_base(settings or DEFAULT_SETTINGS)
    options = {setting: llama_options(setting) for setting in settings}
    sizes = sorted(sizes)
    check_settings(model_file, settings, sizes[0])
    profiles = profiles_of(model_file, settings, threads)
    run = Run(
        json_path,
        "memory",
        {
            "model": model_file.name,
            "sizes": sizes,
            "settings": settings,
            "fraction": fraction,
            "gibs": list(gibs),
            "n_gpu_layers": n_gpu_layers,
            "threads": threads,
        },
        [model_file, *profiles],
    )
    runs = [(n, s) for n in sizes for s in settings]
    with progress("measuring", len(runs), "runs") as bar:
        for n_ctx, setting in runs:
            bar.say(f"{setting}, n_ctx {n_ctx}")
            llama = {
                "model_path": str(model_file.path),
                **context_options(n_ctx, threads, n_gpu_layers),
                **options[setting],
            }
            run.record(f"memory|{setting}|{n_ctx}", partial(measure, llama, fraction, setting, shape, gibs))
            bar.advance()
    print_table(f"{model_file.name}, {fraction:.0%} of the context read", *memory_table(run.data))

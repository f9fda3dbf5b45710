"""How fast? Prefill and decode at several depths against stock llama.cpp of the same commit, runs interleaved.

    llama-semanticache bench speed MODEL --text FILE --depth 7600 --stock-lib build/stock/bin --json speed.json

Every setting has a process of its own that keeps its model; in each round all settings are measured one after the
other, so that what disturbs the machine disturbs them alike. A speed is compared with stock f16 within its round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click

from .. import _native, models
from .._progress import progress
from ..cli.common import model_argument
from ..errors import ArgumentError
from ..model_file import ModelFile
from .options import gpu_layers_option, json_option, setting_option, text_option, threads_option
from .process import Worker
from .runs import Run
from .settings import BASE, STOCK, check_settings, context_options, estimated, parse_setting, profiles_of, with_base
from .tables import print_table

STOCK_VARIABLE = "LLAMA_SEMANTICACHE_STOCK_LIB"


def load_options(setting: str, path: Path, common: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `worker.make` for a setting, see `settings`."""
    cache = {"cache": STOCK[setting]} if setting in STOCK else {"kv": parse_setting(setting)}
    return {"model_path": str(path), **common, **cache}


class Workers(ExitStack):
    """A process per setting, started and given its model when it is first asked."""

    def __init__(self, options: dict[str, dict[str, Any]], stock_lib: Path):
        super().__init__()
        self.options, self.stock_lib = options, stock_lib
        self.workers: dict[str, Worker] = {}

    def ask(self, setting: str, **order: Any) -> dict[str, Any]:
        if setting not in self.workers:
            env = {_native.LIB_VARIABLE: str(self.stock_lib if setting in STOCK else _native.library_folder())}
            command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
            worker = self.enter_context(Worker(setting, command, env))
            worker.ask(load=self.options[setting])
            self.workers[setting] = worker
        return self.workers[setting].ask(**order)


def measure(
    run: Run,
    model: ModelFile,
    text: str,
    settings: Sequence[str],
    depths: Sequence[int],
    n_decode: int,
    rounds: int,
    common: dict[str, Any],
    stock_lib: Path,
) -> None:
    """Records "speed|SETTING|DEPTH|ROUND": prefill_s, decode_s, kv_bytes, resident_bytes and for ours pass_s and
    decode_pass_s (of prefill and of decoding), rows_used.
    """
    stock_bytes = {s: estimated(model.shape, common["n_ctx"], s).kv_bytes for s in settings if s in STOCK}
    names = [(d, i, s, f"speed|{s}|{d}|{i}") for d in depths for i in range(rounds) for s in settings]
    missing = [name for *_, name in names if name not in run.records]
    if not missing:
        return
    with (
        Workers({s: load_options(s, model.path, common) for s in settings}, stock_lib) as workers,
        progress("measuring", len(names), "runs", done=len(names) - len(missing)) as bar,
    ):
        tokens = workers.ask(BASE, tokenize=text)["tokens"]
        if len(tokens) < max(depths) + n_decode:
            raise ArgumentError(
                f"text: expected at least {max(depths) + n_decode} tokens, got {len(tokens)}; name a longer one or a "
                "smaller depth"
            )
        for depth, _, setting, name in names:
            if name not in missing:
                continue
            bar.say(f"{setting} at {depth}")
            order = dict(warm_up=tokens[:32], prompt=tokens[:depth], decode=tokens[depth : depth + n_decode])
            run.record(name, partial(_ask, workers, setting, order, stock_bytes.get(setting)))
            bar.advance()


def _ask(workers: Workers, setting: str, order: dict[str, Any], kv_bytes: int | None) -> dict[str, Any]:
    """One record; a stock llama.cpp does not tell the bytes of its cache."""
    return {"kv_bytes": kv_bytes, **workers.ask(setting, **order)}


def speed_records(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per setting and depth, with lists over the rounds: prefill_s, decode_s, pass_s, decode_pass_s,
    resident_bytes.
    """
    out: dict[tuple[str, int], dict[str, Any]] = {}
    for name, record in run["records"].items():
        part, setting, depth, _ = name.split("|")
        if part != "speed":
            continue
        row = out.setdefault(
            (setting, int(depth)),
            {
                "setting": setting,
                "depth": int(depth),
                "prefill_s": [],
                "decode_s": [],
                "pass_s": [],
                "decode_pass_s": [],
                "resident_bytes": [],
            },
        )
        for key, value in record.items():
            if isinstance(row.get(key), list):
                row[key].append(value)
            else:
                row[key] = value
    return list(out.values())


def rate(record: dict[str, Any], what: str, n_tokens: int) -> float:
    """Median tokens per second."""
    return n_tokens / median(record[what])


def ratios(record: dict[str, Any], base: dict[str, Any], what: str) -> list[float]:
    """Times faster than the base, round by round."""
    return [theirs / ours for theirs, ours in zip(base[what], record[what], strict=False)]


def share(part: Sequence[float], whole: Sequence[float]) -> str:
    """Of all rounds together; empty if nothing of the kind was measured."""
    return f"{sum(part) / sum(whole):.1%}" if part else ""


def speed_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and cells; factors are medians over the rounds."""
    head = [
        "depth",
        "cache",
        "KV MiB",
        "resident MiB",
        "prefill t/s",
        "x f16",
        "decode t/s",
        "x f16 (least to most)",
        "passes of prefill",
        "of decode",
    ]
    records = speed_records(run)
    base = {r["depth"]: r for r in records if r["setting"] == BASE}
    cells = []
    for r in records:
        prefill, decode = (ratios(r, base[r["depth"]], what) for what in ("prefill_s", "decode_s"))
        cells.append(
            [
                str(r["depth"]),
                r["setting"],
                f"{r['kv_bytes'] / 2**20:.1f}",
                f"{median(r['resident_bytes']) / 2**20:.0f}",
                f"{rate(r, 'prefill_s', r['depth']):.0f}",
                f"{median(prefill):.2f}",
                f"{rate(r, 'decode_s', run['asked']['n_decode']):.1f}",
                f"{median(decode):.2f} ({min(decode):.2f} to {max(decode):.2f})",
                share(r["pass_s"], r["prefill_s"]),
                share(r["decode_pass_s"], r["decode_s"]),
            ]
        )
    return head, cells


@click.command()
@model_argument
@text_option("Text to read from.")
@click.option(
    "--depth",
    "depths",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1000, 7600),
    show_default=True,
    help="Tokens before the decoding; repeatable.",
)
@setting_option
@click.option(
    "--n-decode",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens decoded one by one; with 256 or more a pass is among them.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@gpu_layers_option
@threads_option
@click.option(
    "--stock-lib",
    envvar=STOCK_VARIABLE,
    type=click.Path(exists=True, file_okay=False),
    help=f"Folder of stock llama.cpp's libraries (make stock).  [env: {STOCK_VARIABLE}]",
)
@json_option
def speed(model, text_path, depths, settings, n_decode, rounds, n_gpu_layers, threads, stock_lib, json_path) -> None:
    """Prefill and decode speed of MODEL, against stock llama.cpp of the same commit."""
    if stock_lib is None:
        raise ArgumentError(
            "--stock-lib: expected the folder of stock llama.cpp's libraries, got none; run `make stock` and pass "
            f"build/stock/bin or set {STOCK_VARIABLE}"
        )
    model_file = models.open_model(model)
    settings = with_base(settings or (*STOCK, "semanticache:0.25", "semanticache:0.125"))
    depths = sorted(depths)
    n_ctx = -(-(depths[-1] + n_decode) // 256) * 256
    check_settings(model_file, settings, n_ctx)
    profiles = profiles_of(model_file, settings, threads)
    run = Run(
        json_path,
        "speed",
        {
            "model": model_file.name,
            "text": text_path.name,
            "depths": depths,
            "settings": settings,
            "n_decode": n_decode,
            "rounds": rounds,
            "n_gpu_layers": n_gpu_layers,
            "threads": threads,
        },
        [
            model_file,
            text_path,
            *profiles,
            *(p for p in Path(stock_lib).iterdir() if p.is_file() and not p.is_symlink()),
        ],
    )
    measure(
        run,
        model_file,
        models.read_text(text_path),
        settings,
        depths,
        n_decode,
        rounds,
        context_options(n_ctx, threads, n_gpu_layers),
        Path(stock_lib).resolve(),
    )
    print_table(
        f"{model_file.name}, {text_path.name}, {rounds} rounds, threads: {threads or 'as llama-cpp-python chooses'}",
        *speed_table(run.data),
    )

"""How fast? Prefill and decode at several depths against stock llama.cpp of the same commit, runs interleaved.

    llama-semanticache bench speed MODEL --text FILE --depth 7600 --stock-lib build/stock/bin --json speed.json

Every setting has a process of its own that keeps its model; in each round all settings are measured one after the other, so
that what disturbs the machine disturbs them alike. A speed is compared with stock f16 within its round.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Sequence

import click

from .. import models, profile, upstream_commit
from ..errors import ArgumentError, SemanticCacheError
from ..memory import estimate, read_shape
from .settings import parse_setting

BASE = "stock:f16"
STOCK = ("stock:f16", "stock:q8_0", "stock:q4_0")
STOCK_VARIABLE = "LLAMA_SEMANTICACHE_STOCK_LIB"


class Worker:
    """A process of `worker.py`."""

    def __init__(self, setting: str, library: Path | None):
        self.setting = setting
        env = dict(os.environ)
        env.pop("LLAMA_CPP_LIB_PATH", None)
        if library is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to one order."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SemanticCacheError(
                f"{self.setting}: expected a measurement, got the end of its process (status {self.process.wait()}); its own message stands above"
            )
        return json.loads(line)


def load_options(setting: str, path: Path, n_ctx: int, threads: int | None) -> dict[str, Any]:
    """Arguments of `worker.make` for a setting: "stock:f16", "stock:q8_0", "stock:q4_0" or one of ours, see `parse_setting`."""
    common = dict(model_path=str(path), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)
    if setting.startswith("stock:"):
        if setting not in STOCK:
            raise ArgumentError(f"setting: expected one of {', '.join(STOCK)} or METHOD:RATIO, got {setting!r}")
        return {**common, "cache": setting.split(":")[1]}
    return {**common, "kv": parse_setting(setting)[1]}


def measure(
    path: Path, text: str, settings: Sequence[str], depths: Sequence[int], n_decode: int, rounds: int, threads: int | None, stock_lib: Path
) -> list[dict[str, Any]]:
    """One record per setting and depth, with lists over the rounds: prefill_s, decode_s, pass_s."""
    from tqdm import tqdm

    n_ctx = -(-(max(depths) + n_decode) // 256) * 256
    records = {(s, d): {"setting": s, "depth": d, "prefill_s": [], "decode_s": [], "pass_s": []} for d in depths for s in settings}
    options = {setting: load_options(setting, path, n_ctx, threads) for setting in settings}
    with ExitStack() as stack, tqdm(total=len(records) * rounds, unit="run") as bar:
        workers = {}
        for setting in settings:
            worker = stack.enter_context(Worker(setting, stock_lib if setting.startswith("stock:") else None))
            worker.ask(load=options[setting])
            workers[setting] = worker
        tokens = workers[settings[0]].ask(tokenize=text)["tokens"]
        if len(tokens) < max(depths) + n_decode:
            raise ArgumentError(f"text: expected at least {max(depths) + n_decode} tokens, got {len(tokens)}; name a longer one or a smaller depth")
        for depth in depths:
            for _ in range(rounds):
                for setting in settings:
                    bar.set_postfix_str(f"{setting} at {depth}")
                    answer = workers[setting].ask(warm_up=tokens[:32], prompt=tokens[:depth], decode=tokens[depth : depth + n_decode])
                    record = records[setting, depth]
                    for key in ("prefill_s", "decode_s", "pass_s"):
                        if key in answer:
                            record[key].append(answer.pop(key))
                    record.update(answer)
                    bar.update()
    shape = read_shape(path)
    for record in records.values():
        if record["setting"].startswith("stock:"):
            record["kv_bytes"] = estimate(shape, n_ctx, record["setting"].split(":")[1]).kv_bytes
    return list(records.values())


def rate(record: dict[str, Any], what: str, n_tokens: int) -> float:
    """Median tokens per second."""
    return n_tokens / median(record[what])


def ratios(record: dict[str, Any], base: dict[str, Any], what: str) -> list[float]:
    """Times faster than the base, round by round."""
    return [theirs / ours for theirs, ours in zip(base[what], record[what])]


def table(result: dict[str, Any]) -> Any:
    """The result as a rich table."""
    from rich.table import Table

    out = Table(title=f"{result['model']}, {result['text']}, {result['rounds']} rounds, {result['threads'] or 'all'} threads")
    for column in ("depth", "cache", "KV MiB", "prefill t/s", "x f16", "decode t/s", "x f16", "least and most", "passes"):
        out.add_column(column, justify="left" if column == "cache" else "right")
    base = {r["depth"]: r for r in result["records"] if r["setting"] == BASE}
    for r in result["records"]:
        prefill, decode = (ratios(r, base[r["depth"]], what) for what in ("prefill_s", "decode_s"))
        out.add_row(
            str(r["depth"]), r["setting"], f"{r['kv_bytes'] / 2**20:.1f}", f"{rate(r, 'prefill_s', r['depth']):.0f}", f"{median(prefill):.2f}",
            f"{rate(r, 'decode_s', result['n_decode']):.1f}", f"{median(decode):.2f}", f"{min(decode):.2f} to {max(decode):.2f}",
            f"{sum(r['pass_s']) / sum(r['prefill_s']):.1%}" if r["pass_s"] else "",
        )  # fmt: skip
    return out


@click.command()
@click.argument("model")
@click.option("--text", "text_path", required=True, type=click.Path(exists=True, dir_okay=False), help="Text to read from.")
@click.option("--depth", "depths", type=click.IntRange(min=1), multiple=True, default=(1000, 7600), show_default=True, help="Tokens before the decoding; repeatable.")
@click.option("--setting", "settings", multiple=True, help="stock:q8_0, stock:q4_0 or METHOD:RATIO[:type_k=q8_0]...; repeatable. stock:f16 is always there.")
@click.option("--n-decode", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens decoded one by one.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=None)
@click.option("--stock-lib", envvar=STOCK_VARIABLE, type=click.Path(exists=True, file_okay=False), help=f"Folder of stock llama.cpp's libraries (make stock).  [env: {STOCK_VARIABLE}]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write everything that was measured.")
def speed(model, text_path, depths, settings, n_decode, rounds, threads, stock_lib, json_path) -> None:
    """Prefill and decode speed of MODEL, against stock llama.cpp of the same commit."""
    from rich.console import Console

    if stock_lib is None:
        raise ArgumentError(f"--stock-lib: expected the folder of stock llama.cpp's libraries, got none; run `make stock` and pass build/stock/bin or set {STOCK_VARIABLE}")
    path = models.resolve(model)
    settings = list(dict.fromkeys([BASE, *(settings or (*STOCK, "semanticache:0.25", "semanticache:0.125"))]))
    if any(s.startswith("semanticache") for s in settings):
        profile.ensure(path, n_threads=threads)
    text = Path(text_path).read_text(encoding="utf-8")
    result = {
        "model": path.name, "text": Path(text_path).name, "n_decode": n_decode, "rounds": rounds, "threads": threads,
        "machine": platform.processor() or platform.machine(), "upstream_commit": upstream_commit(),
        "records": measure(path, text, settings, sorted(depths), n_decode, rounds, threads, Path(stock_lib).resolve()),
    }  # fmt: skip
    Console(width=140).print(table(result))
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=1), encoding="utf-8")

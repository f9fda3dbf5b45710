"""llama-semanticache memory: what a model needs, and on which card it fits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..config import OURS
from ..memory import N_CTX_MEASURED
from ..models import open_model
from .common import DEFAULT_N_CTX, json_option, kv_sizes, model_argument, traceback_option

if TYPE_CHECKING:
    from rich.table import Table

    from ..memory import MemoryReport


@click.command()
@model_argument
@click.option(
    "--n-ctx",
    type=click.IntRange(min=1),
    multiple=True,
    help="Context size, tokens; may be given several times.  [default: what the model was trained for]",
)
@kv_sizes
@click.option(
    "--swa-full", is_flag=True, help="Count n_ctx tokens in sliding-window layers too (llama_cpp.Llama's default)."
)
@json_option
@traceback_option
def memory(
    model: str,
    n_ctx: tuple[int, ...],
    swa_full: bool,
    as_json: bool,
    **kv: Any,
) -> None:
    """Show the memory that MODEL needs, computed from its metadata; nothing is loaded."""
    from ..memory import memory_report

    model_file = open_model(model, progress=not as_json)
    sizes = n_ctx or (model_file.shape.n_ctx_train or DEFAULT_N_CTX,)
    report = memory_report(model_file, sizes, swa_full=swa_full, **kv)
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False, indent=2))
        return

    from rich.console import Console

    console = Console(highlight=False)
    shape = report.model
    console.print(
        f"{shape.name or model_file.name} ({shape.arch}): weights {shape.weights_bytes / 2**20:,.1f} MiB, "
        f"{len(shape.of_kind('full'))} layers with full attention, {len(shape.of_kind('swa'))} with a sliding window; "
        f"trained for {shape.n_ctx_train:,} tokens",
        markup=False,
    )
    for size in sizes:
        console.print(_size_table(report, size))
    if report.max_n_ctx:
        console.print(_card_table(report))
        if any(n > N_CTX_MEASURED for n in report.max_n_ctx.get(OURS, {}).values()):
            console.print(f"* What compression loses was measured up to {N_CTX_MEASURED:,} tokens (docs/results.md).")
    for note in report.notes:
        console.print(f"Left out - {note}", markup=False)
    console.print(
        "1 MiB = 1024^2 bytes, 1 GB = 1024^3 bytes. Cache and weights follow llama.cpp's allocation; 'all' adds what "
        "passes work in on a card that computes them, at the most, and an estimate of the rest (compute buffer with "
        "flash attention, batches of 512 tokens, 300 MiB for the driver).",
        style="dim",
    )


def _label(report: MemoryReport, cache: str) -> str:
    return f"{cache} {report.kv_ratio:g}" if cache == OURS else cache


def _table(title: str, headings: Iterable[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("KV cache", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _size_table(report: MemoryReport, n_ctx: int) -> Table:
    table = _table(f"{n_ctx:,} tokens", ("KV MiB", "smaller", "all MiB", *(f"{card} GB" for card in report.cards_gb)))
    for entry in report.estimates:
        if entry.n_ctx == n_ctx:
            fits = ["fits" if entry.fits(card) else "-" for card in report.cards_gb]
            sizes = [
                f"{entry.kv_bytes / 2**20:,.1f}",
                f"{entry.compression_factor:.2f}x",
                f"{entry.total_bytes / 2**20:,.1f}",
            ]
            table.add_row(_label(report, entry.cache), *sizes, *fits)
    return table


def _card_table(report: MemoryReport) -> Table:
    limit = f"{report.model.n_ctx_train:,}"
    table = _table(f"Largest n_ctx that fits, at most {limit}", (f"{card} GB" for card in report.cards_gb))
    for cache, by_card in report.max_n_ctx.items():
        known = N_CTX_MEASURED if cache == OURS else max(by_card.values())
        sizes = (f"{n:,}{'*' * (n > known)}" if n else "-" for n in by_card.values())
        table.add_row(_label(report, cache), *sizes)
    return table

"""One page of tables and plots from the JSON files of runs: `llama-semanticache bench report DIR`.

Writes report.md and report.html (self-contained) into the folder. Nothing is measured; every figure carries the model, command,
machine and date of its run.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Callable, Iterable

import click
import numpy as np

from ..errors import ArgumentError
from .chat import chat_table
from .memory import memory_table
from .quality import text_rows, text_table
from .runs import read
from .speed import rate, speed_records, speed_table
from .tasks import task_table

TABLES: dict[str, Callable[[dict[str, Any]], tuple[list[str], list[list[str]]]]] = {
    "quality": text_table, "speed": speed_table, "memory": memory_table, "tasks": task_table, "chat": chat_table,
}  # fmt: skip


def scatter(title: str, x_label: str, y_label: str, points: Iterable[tuple[str, float, float]], log: bool = False) -> Any:
    """Named points; the better is up and left, or down and left on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, x, y in points:
        axes.scatter(x, y, marker="s" if name.startswith("stock") else "o" if name.startswith("semanticache") else "x")
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    return figure


def lines(title: str, x_label: str, y_label: str, series: dict[str, list[tuple[float, float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def heat_map(title: str, x_label: str, y_label: str, values: np.ndarray, x: list[str], y: list[str], form: str, top: float | None = None) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.55 * len(x), 1.4 + 0.32 * len(y)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xticks=range(len(x)), yticks=range(len(y)))
    axes.set_xticklabels(x, fontsize=7)
    axes.set_yticklabels(y, fontsize=7)
    if values.size <= 200:
        for i, j in np.ndindex(values.shape):
            axes.text(j, i, format(values[i, j], form), ha="center", va="center", fontsize=6, color="white")
    figure.colorbar(image)
    return figure


def quality_plots(run: dict[str, Any]) -> list[Any]:
    rows = text_rows(run)
    plots = []
    for n in sorted({r["tokens"] for r in rows}):
        some = [r for r in rows if r["tokens"] == n]
        compressed = [(r["setting"], r["kv_mib"], r["kl"]) for r in some if r["kl"] is not None]
        plots.append(scatter(f"KL divergence by memory, {n} tokens", "KV cache, MiB", "KL, nats per token", compressed, log=True))
        plots.append(scatter(f"Facts by memory, {n} tokens", "KV cache, MiB", "share of facts", [(r["setting"], r["kv_mib"], r["facts"] / r["questions"]) for r in some]))
    by_setting: dict[str, list[tuple[float, float]]] = {}
    recall: dict[tuple[str, float], list[float]] = {}
    for r in rows:
        if r["kl"] is not None:
            by_setting.setdefault(r["setting"], []).append((r["tokens"], r["kl"]))
    if any(len(points) > 1 for points in by_setting.values()):
        plots.append(lines("KL divergence by length", "tokens", "KL, nats per token", by_setting))
    budgets: dict[str, list[list[int]]] = {}
    for name, record in run["records"].items():
        _, setting, n, _ = name.split("|")
        for a in record["answers"]:
            recall.setdefault((f"{setting}, {n}", a["depth"]), []).append(a["score"])
        if record.get("heads"):
            budgets[setting] = record["heads"]
    settings, depths = list(dict.fromkeys(s for s, _ in recall)), sorted({d for _, d in recall})
    values = np.array([[np.mean(recall[s, d]) for d in depths] for s in settings])
    plots.append(heat_map("Facts by depth", "depth in the text", "cache, tokens", values, [f"{d:g}" for d in depths], settings, ".2f", top=1))
    for setting, heads in budgets.items():
        layers, n_head = sorted({il for il, *_ in heads}), max(ih for _, ih, *_ in heads) + 1
        values = np.full((n_head, len(layers)), np.nan)
        for il, ih, allocated in heads:
            values[ih, layers.index(il)] = allocated
        plots.append(heat_map(f"Rows of every head, {setting}", "layer", "kv head", values, [str(il) for il in layers], [str(i) for i in range(n_head)], ".0f"))
    return plots


def speed_plots(run: dict[str, Any]) -> list[Any]:
    records = speed_records(run)
    return [
        scatter(f"Decoding by memory, depth {depth}", "KV cache, MiB", "tokens per second", [
            (r["setting"], r["kv_bytes"] / 2**20, rate(r, "decode_s", run["asked"]["n_decode"])) for r in records if r["depth"] == depth
        ])
        for depth in sorted({r["depth"] for r in records})
    ]  # fmt: skip


PLOTS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {"quality": quality_plots, "speed": speed_plots}


def svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llama-semanticache: measurements</title><style>
body { font: 15px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; font-size: 13px; }
code { font-size: 12px; } svg { max-width: 100%; height: auto; }
</style></head><body><h1>Measurements</h1>
{% for run in runs %}<h2>{{ run.title }}</h2>
<p>{{ run.machine }}; {{ run.date }}; llama.cpp {{ run.commit }}<br><code>{{ run.command }}</code></p>
{{ run.table }}
{% for plot in run.plots %}{{ plot }}{% endfor %}
{% endfor %}</body></html>
"""


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(folder: Path) -> None:
    """Tables and plots of the runs in FOLDER, as report.md and report.html beside them."""
    import jinja2
    from markupsafe import Markup
    from tabulate import tabulate

    files = sorted(folder.glob("*.json"))
    if not files:
        raise ArgumentError(f"{folder}: expected the JSON files of bench runs, got none; run bench with --json first")
    markdown, runs = ["# Measurements\n"], []
    for file in files:
        run = read(file)
        head, cells = TABLES[run["kind"]](run)
        title = f"{run['kind']}: {run['asked']['model']}" + "".join(f", {run['asked'][key]}" for key in ("text", "tasks") if key in run["asked"])
        align = ["left" if column in ("cache", "task") else "right" for column in head]
        markdown.append(f"## {title}\n\n{run['machine']}; {run['date']}; llama.cpp {run['upstream_commit'][:9]}\n\n    {run['command']}\n")
        markdown.append(tabulate(cells, head, tablefmt="github", colalign=align, disable_numparse=True) + "\n")
        runs.append({
            "title": title, "machine": run["machine"], "date": run["date"], "commit": run["upstream_commit"][:9], "command": run["command"],
            "table": Markup(tabulate(cells, head, tablefmt="html", colalign=align, disable_numparse=True)),
            "plots": [Markup(svg(plot)) for plot in PLOTS.get(run["kind"], lambda _: [])(run)],
        })  # fmt: skip
    (folder / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    (folder / "report.html").write_text(jinja2.Environment(autoescape=True).from_string(PAGE).render(runs=runs), encoding="utf-8")
    click.echo(f"{len(files)} runs: {folder / 'report.md'}, {folder / 'report.html'}")

"""One page of tables and plots from the JSON files of runs: `llama-semanticache bench report DIR`.

Writes report.html (self-contained), report.md and its plots (the folder plots) into the folder. Nothing is measured;
every figure carries the model, command, machine and date of its runs. Runs that asked the same of other caches share
their plots.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from ..errors import ArgumentError
from .cases import recalled
from .chat import chat_table
from .memory import memory_table
from .quality import text_rows, text_table
from .runs import read
from .settings import BASE
from .speed import ratios, speed_records, speed_table
from .tables import count
from .tasks import task_table

TABLES: dict[str, Callable[[dict[str, Any]], tuple[list[str], list[list[str]]]]] = {
    "quality": text_table,
    "speed": speed_table,
    "memory": memory_table,
    "tasks": task_table,
    "chat": chat_table,
}


def short(setting: str) -> str:
    """A cache's name without what goes without saying."""
    for long, brief in (
        ("stock:", "llama.cpp "),
        ("semanticache:", "semanticache "),
        (":type_k=f16:type_v=f16", " f16"),
        (":merge=0", " unmerged"),
    ):
        setting = setting.replace(long, brief)
    return (
        setting.replace(":type_k=", " K ")
        .replace(":type_v=", " V ")
        .replace(":type_stage=", " stage ")
        .replace(":", " ")
    )


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: Iterable[tuple[str, float, Sequence[float]]],
    earlier: Container[str],
    log: bool = False,
) -> Any:
    """Named points (x, and y with its least and its most); the better is up and left, or down and left on a logarithmic
    axis. llama.cpp's caches are squares, ours dots; those of `earlier` are pale.
    """
    from adjustText import adjust_text
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    names, xs, ys = [], [], []
    for name, x, (y, least, most) in points:
        kind = "stock" if name.startswith("stock") else "ours" if name.startswith("semanticache") else "others"
        look: dict[str, Any] = {
            "color": {"stock": "black", "ours": "tab:blue", "others": "tab:red"}[kind],
            "alpha": 0.45 if name in earlier else 1,
        }
        axes.errorbar(
            x,
            y,
            [[y - least], [most - y]],
            marker={"stock": "s", "ours": "o", "others": "x"}[kind],
            elinewidth=0.8,
            **look,
        )
        names.append(axes.text(x, y, short(name), fontsize=7, **look))
        xs += [x] * 3
        ys += [least, y, most]
        if name in earlier:
            axes.set_xlabel(f"{x_label} (pale: an earlier build)")
    adjust_text(
        names,
        x=xs,
        y=ys,
        ax=axes,
        expand=(1.1, 1.6),
        iter_lim=300,
        arrowprops={"arrowstyle": "-", "color": "gray", "lw": 0.5},
    )
    return figure


def lines(title: str, x_label: str, y_label: str, series: dict[str, list[tuple[float, float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def heat_map(
    title: str,
    x_label: str,
    y_label: str,
    values: np.ndarray,
    x: list[str],
    y: list[str],
    form: str,
    top: float | None = None,
) -> Any:
    from matplotlib.figure import Figure

    top = float(np.nanmax(values)) if top is None else top
    figure = Figure(figsize=(2.5 + 0.06 * max(map(len, y)) + 0.5 * len(x), 1.4 + 0.3 * len(y)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xticks=range(len(x)), yticks=range(len(y)))
    axes.set_xticklabels(x, fontsize=7)
    axes.set_yticklabels(y, fontsize=7)
    if values.size <= 200:
        for i, j in np.argwhere(~np.isnan(values)):
            axes.text(
                j,
                i,
                format(values[i, j], form),
                ha="center",
                va="center",
                fontsize=6,
                color="black" if values[i, j] > 0.6 * top else "white",
            )
    figure.colorbar(image)
    return figure


def quality_plots(runs: Sequence[dict[str, Any]]) -> list[Any]:
    run, earlier = merged(runs), of_earlier_builds(runs)
    rows = text_rows(run)
    plots = []
    for n in sorted({r["tokens"] for r in rows}):
        some = [
            r for r in rows if r["tokens"] == n and ":profile=" not in r["setting"]
        ]  # those are compared in the table
        compressed = [(r["setting"], r["kv_mib"], (r["kl"], r["kl_least"], r["kl_most"])) for r in some if r["kl"]]
        facts = [(r["setting"], r["kv_mib"], 3 * (r["facts"] / r["questions"],)) for r in some]
        plots.append(
            scatter(
                f"KL divergence by memory, {n} tokens",
                "KV cache, MiB",
                "KL, nats per token",
                compressed,
                earlier,
                log=True,
            )
        )
        plots.append(scatter(f"Facts by memory, {n} tokens", "KV cache, MiB", "share of facts", facts, earlier))
    by_setting: dict[str, list[tuple[float, float]]] = {}
    by = (
        "kind" if run["asked"].get("suite") == "ruler" else "depth"
    )  # the sentences of a harder fact lie at several depths
    recall: dict[tuple[str, Any], list[float]] = {}
    for r in rows:
        if r["kl"] is not None:
            by_setting.setdefault(short(r["setting"]), []).append((r["tokens"], r["kl"]))
    if any(len(points) > 1 for points in by_setting.values()):
        plots.append(lines("KL divergence by length", "tokens", "KL, nats per token", by_setting))
    budgets: dict[str, list[list[int]]] = {}
    for name, record in run["records"].items():
        _, setting, n, _ = name.split("|")
        for a in record["answers"]:
            recall.setdefault((f"{short(setting)}, {n}", a[by]), []).append(recalled(a["want"], a["got"]))
        if record.get("heads"):
            budgets[setting] = record["heads"]
    settings, groups = list(dict.fromkeys(s for s, _ in recall)), sorted({group for _, group in recall})
    values = np.array([[np.mean(recall.get((s, group), np.nan)) for group in groups] for s in settings])
    plots.append(
        heat_map(
            f"Facts by {by}",
            "kind" if by == "kind" else "depth in the text",
            "cache, tokens",
            values,
            list(map(str, groups)),
            settings,
            ".2f",
            top=1,
        )
    )
    for setting, heads in budgets.items():
        rows_of_head = [allocated for *_, allocated in heads]
        if max(rows_of_head) - min(rows_of_head) <= 1:  # nothing to see but what does not divide
            continue
        layers, n_head = sorted({il for il, *_ in heads}), max(ih for _, ih, *_ in heads) + 1
        values = np.full((n_head, len(layers)), np.nan)
        for il, ih, allocated in heads:
            values[ih, layers.index(il)] = allocated
        plots.append(
            heat_map(
                f"Rows of every head, {short(setting)}",
                "layer",
                "kv head",
                values,
                [str(il) for il in layers],
                [str(i) for i in range(n_head)],
                ".0f",
            )
        )
    return plots


def speed_plots(runs: Sequence[dict[str, Any]]) -> list[Any]:
    points: dict[tuple[int, str], dict[str, tuple[float, Sequence[float]]]] = {}
    earlier = of_earlier_builds(runs)
    for run in runs:
        records = speed_records(run)
        base = {r["depth"]: r for r in records if r["setting"] == BASE}
        for r in records:
            for name, what in (("Prefill", "prefill_s"), ("Decoding", "decode_s")):
                times = ratios(r, base[r["depth"]], what)
                points.setdefault((r["depth"], name), {})[r["setting"]] = (
                    r["kv_bytes"] / 2**20,
                    (median(times), min(times), max(times)),
                )
    return [
        scatter(
            f"{name} by memory, depth {depth}",
            "KV cache, MiB",
            "times llama.cpp's f16 cache",
            [(s, *p) for s, p in some.items()],
            earlier,
        )
        for (depth, name), some in sorted(points.items())
    ]


PLOTS: dict[str, Callable[[Sequence[dict[str, Any]]], list[Any]]] = {"quality": quality_plots, "speed": speed_plots}


def svg(figure: Any) -> str:
    """The figure as an SVG element, the same for the same figure."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


PARTS = ("min_tokens", "max_tokens", "first_chat", "n_chats")
"""What is asked of a run to choose some of its items or conversations; records are named by these."""


def subject(run: dict[str, Any]) -> str:
    """What a run has in common with those that its caches may be compared with: all that was asked but the caches and
    `PARTS`.
    """
    return json.dumps(
        [
            run["kind"],
            {
                "n_gpu_layers": 0,
                **{k: v for k, v in run["asked"].items() if k not in ("settings", "threads", "jobs", "rounds", *PARTS)},
            },
        ],
        sort_keys=True,
    )


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a subject as one; of a record in two of them the later."""
    return {
        "kind": runs[0]["kind"],
        "asked": {
            **runs[0]["asked"],
            "settings": list(dict.fromkeys(s for run in runs for s in run["asked"]["settings"])),
        },
        "records": {name: record for run in runs for name, record in run["records"].items()},
    }


def of_earlier_builds(runs: Sequence[dict[str, Any]]) -> set[str]:
    """Settings that were last measured before the first run of the build that measured our method last (else of the
    last build).
    """
    ours = [run for run in runs if any(s.startswith("semanticache:") for s in run["asked"]["settings"])]
    first = [run.get("build") for run in runs].index((ours or runs)[-1].get("build"))
    later = {s for run in runs[first:] for s in run["asked"]["settings"]}
    return {s for run in runs for s in run["asked"]["settings"]} - later


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llama-semanticache: measurements</title><style>
body { font: 15px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; font-size: 13px; }
code { font-size: 12px; } svg { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
</style></head><body><h1>Measurements</h1>
{% for subject in subjects %}<h2>{{ subject.title }}</h2>
{% for run in subject.runs %}<p>{{ run.where }}{% if run.command %}<br><code>{{ run.command }}</code>{% endif %}</p>
<div class="wide">{{ run.html }}</div>
{% endfor %}{% for plot in subject.plots %}{{ plot }}{% endfor %}
{% endfor %}</body></html>
"""

MARKDOWN = """# Measurements
{% for subject in subjects %}
## {{ subject.title }}
{% for run in subject.runs %}
{{ run.where }}
{% if run.command %}
    {{ run.command }}
{% endif %}
{{ run.markdown }}
{% endfor %}{% for file in subject.files %}
![{{ subject.title }}]({{ file }})
{% endfor %}{% endfor %}"""


def show_table(run: dict[str, Any]) -> dict[str, Any]:
    """The run's table in both languages."""
    from markupsafe import Markup
    from tabulate import tabulate

    head, cells = TABLES[run["kind"]](run)
    align = ["left" if column in ("cache", "task") else "right" for column in head]
    tables = {
        form: tabulate(cells, head, tablefmt=form, colalign=align, disable_numparse=True) for form in ("github", "html")
    }
    return {"markdown": tables["github"], "html": Markup(tables["html"])}


def show(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page says of each run, and of tasks and conversations in several runs before that what they say
    together; of tasks, of the caches that have answered all.
    """
    together = []
    if runs[0]["kind"] in ("tasks", "chat") and len(runs) > 1:
        run = merged(runs)
        answered = {
            s: {tuple(name.split("|")[2:]) for name in run["records"] if name.split("|")[1] == s}
            for s in run["asked"]["settings"]
        }
        everything = set().union(*answered.values())
        run["asked"]["settings"] = [s for s, items in answered.items() if items == everything]
        together = [{"where": f"{len(runs)} runs together", "command": "", **show_table(run)}]
    return together + [
        {
            "where": f"{run['machine']}; {run['date']}; llama.cpp {run['upstream_commit'][:9]}",
            "command": run["command"],
            **show_table(run),
        }
        for run in runs
    ]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(folder: Path) -> None:
    """Tables and plots of the runs in FOLDER, as report.md and report.html beside them."""
    import jinja2
    from markupsafe import Markup

    files = sorted(folder.glob("*.json"))
    if not files:
        raise ArgumentError(f"{folder}: expected the JSON files of bench runs, got none; run bench with --json first")
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for file in files:
        run = read(file)
        if run["kind"] not in TABLES:
            raise ArgumentError(
                f"{file}: expected a run of bench {', '.join(TABLES)}, got one of {run['kind']!r}; move it elsewhere"
            )
        groups.setdefault(subject(run), {})[file.stem] = run
    subjects = []
    (folder / "plots").mkdir(exist_ok=True)
    for group in groups.values():
        name = min(group, key=len)
        run = group[name]
        by_date = sorted(group.values(), key=lambda r: r["date"])
        figures = PLOTS.get(run["kind"], lambda _: [])(by_date)
        machines = "; ".join(dict.fromkeys(r["machine"] for r in by_date))
        caption = f"{run['asked']['model']}; {machines}; {by_date[0]['date'][:10]} to {by_date[-1]['date'][:10]}"
        for figure in figures:
            figure.suptitle(caption, fontsize=6, color="gray")
        plots = list(map(svg, figures))
        names = [f"plots/{name}-{i}.svg" for i in range(1, len(plots) + 1)]
        for plot, file_name in zip(plots, names, strict=True):
            (folder / file_name).write_text(plot, encoding="utf-8")
        title = f"{run['kind']}: {run['asked']['model']}" + "".join(
            f", {run['asked'][key]}" for key in ("text", "tasks") if key in run["asked"]
        )
        title += "".join(
            f", {key} {', '.join(map(str, run['asked'][key]))}"
            for key in ("lengths", "depths", "sizes")
            if key in run["asked"]
        )
        title += ", harder facts" if run["asked"].get("suite") == "ruler" else ""
        subjects.append({"title": title, "runs": show(by_date), "plots": list(map(Markup, plots)), "files": names})
    (folder / "report.md").write_text(jinja2.Template(MARKDOWN).render(subjects=subjects), encoding="utf-8")
    (folder / "report.html").write_text(
        jinja2.Environment(autoescape=True).from_string(PAGE).render(subjects=subjects), encoding="utf-8"
    )
    click.echo(f"{count(len(files), 'run')}: {folder / 'report.md'}, {folder / 'report.html'}")

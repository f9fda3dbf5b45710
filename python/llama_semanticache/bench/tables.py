"""Tables of a run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

KEYS = ("tokens", "n_ctx", "depth", "task", "cache")
"""Columns that say which row it is."""


def count(n: int, what: str) -> str:
    """A number of things: "1 case", "2 cases"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def print_table(title: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal; what does not fit stands in tables below it, with the key columns again."""
    from rich.console import Console
    from rich.table import Table

    def table(columns: Sequence[int], title: str | None) -> Table:
        shown = Table(title=title, title_justify="left")
        for i in columns:
            shown.add_column(head[i], justify="left" if head[i] in ("cache", "task") else "right", no_wrap=True)
        for row in cells:
            shown.add_row(*(row[i] for i in columns))
        return shown

    console, endless = Console(), Console(width=10_000)
    keys = [i for i, name in enumerate(head) if name in KEYS]
    parts: list[list[int]] = [[]]
    for i in (i for i in range(len(head)) if i not in keys):
        if parts[-1] and endless.measure(table([*keys, *parts[-1], i], None)).maximum > console.width:
            parts.append([])
        parts[-1].append(i)
    for n, part in enumerate(parts):
        console.print(table([*keys, *part], None if n else title))

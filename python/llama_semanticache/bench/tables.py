"""Tables of a run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(title: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in head:
        table.add_column(column, justify="left" if column in ("cache", "task") else "right")
    for row in cells:
        table.add_row(*row)
    Console(width=160).print(table)

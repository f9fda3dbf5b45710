"""The one kind of progress bar, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID


@dataclass
class Bar:
    """What a running bar is told; without a display it says nothing."""

    display: Progress | None = None
    task: TaskID | None = field(default=None, repr=False)

    def advance(self, n: int = 1) -> None:
        """So much more is done."""
        if self.display is not None and self.task is not None:
            self.display.advance(self.task, n)

    def say(self, text: str) -> None:
        """What is being done at present."""
        if self.display is not None and self.task is not None:
            self.display.update(self.task, doing=text)


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """Context with a bar that shows how much is done, and the time left.

    Parameters
    ----------
    label : str
        What is done.
    total, done : int
        How much there is to do, and how much of it is done already.
    unit : str
        Of these numbers; "bytes" are shown as MiB with their speed.
    show : bool
        Whether there is a bar at all.
    """
    if not show:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if unit == "bytes":
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    else:
        columns += [MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[doing]}")]
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(display, display.add_task(label, total=total, completed=done, doing=""))

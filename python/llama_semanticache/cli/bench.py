"""llama-semanticache bench: measurements on the user's own machine and model."""

from __future__ import annotations

import click

from ..bench.speed import speed


@click.group()
def bench() -> None:
    """Measure: does compression pay here?"""


bench.add_command(speed)

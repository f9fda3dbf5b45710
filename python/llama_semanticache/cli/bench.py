"""llama-semanticache bench: measurements on the user's own machine and model."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import click

from ..errors import SemanticCacheError
from .common import traceback_option

COMMANDS = {
    name: f"llama_semanticache.bench.{name}" for name in ("chat", "memory", "quality", "report", "speed", "tasks")
}
"""A module each, with a command of its name; imported when it is called, since some of them load llama_cpp."""


@cache
def _command(name: str) -> click.Command:
    return traceback_option(getattr(import_module(COMMANDS[name]), name))


class BenchGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _command(name) if name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise SemanticCacheError(
                f"bench: expected the package {error.name}, got none; install the extra: pip install "
                "'llama-semanticache[bench]'"
            ) from error


@click.group(cls=BenchGroup)
def bench() -> None:
    """Measure: does compression pay here?"""

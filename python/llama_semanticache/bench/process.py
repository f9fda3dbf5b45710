"""Processes that are told what to measure, line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SemanticCacheError


class Worker:
    """A process that answers a JSON object on its standard input with one on its output.

    Parameters
    ----------
    name : str
        What it measures, for errors.
    command : sequence of str
    env : mapping, optional
        Variables to set, or with None to take away.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str | None] | None = None):
        self.name = name
        told = {"PYTHONWARNINGS": "ignore:threads"}  # by the process that starts it
        env = {**os.environ, **told, **(env or {})}
        pipe = subprocess.PIPE
        kept = {key: value for key, value in env.items() if value is not None}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=kept)
        self.orders: Any = self.process.stdin
        self.answers: Any = self.process.stdout

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended with an order unread
            self.orders.close()
        self.process.wait()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to one order."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: said below
            self.orders.write(json.dumps(order) + "\n")
            self.orders.flush()
        line = self.answers.readline()
        if not line:
            raise SemanticCacheError(
                f"{self.name}: expected a measurement, got the end of its process (status {self.process.wait()}); its "
                "own message stands above"
            )
        return json.loads(line)

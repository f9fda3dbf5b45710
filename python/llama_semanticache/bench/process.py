"""Processes that are told what to measure, line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from typing import Any, Mapping, Sequence

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
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={key: value for key, value in env.items() if value is not None},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended with an order unread
            self.process.stdin.close()
        self.process.wait()

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer to one order."""
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: said below
        line = self.process.stdout.readline()
        if not line:
            raise SemanticCacheError(
                f"{self.name}: expected a measurement, got the end of its process (status {self.process.wait()}); its own message stands above"
            )
        return json.loads(line)

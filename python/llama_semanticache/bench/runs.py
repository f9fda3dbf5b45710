"""The JSON file of a run: what was asked, where, and a record for everything that was measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__, _native, upstream_commit
from ..errors import ArgumentError
from ..model_file import ModelFile
from ..models import sha256
from .cards import cards


def machine() -> str:
    """The processor, how many of it, the cards and the system, in words. Family and model tell generations apart that
    share a name.
    """
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        words = dict(
            reversed(
                [[word.strip() for word in line.split(":", 1)] for line in info.read_text().splitlines() if ":" in line]
            )
        )  # the first CPU's
        name = words.get("model name", name)
        if {"cpu family", "model"} <= words.keys():
            name += f" (family {words['cpu family']}, model {words['model']})"
    return ", ".join([name, f"{os.cpu_count()} CPUs", *(card.name for card in cards()), platform.system()])


def command_line() -> str:
    """This process's command, with the names of files alone: their folders are private."""
    return shlex.join([re.sub(r"(^|=)[^=]*/(?=[^/])", r"\1", word) for word in sys.argv])


def build() -> str:
    """SHA-256 of the native libraries, the first 16 digits: two builds of one version may measure differently."""
    return hashlib.sha256(
        "".join(sha256(path) for path in sorted(_native.library_folder().iterdir()) if path.is_file()).encode()
    ).hexdigest()[:16]


def _input(file: Path | ModelFile) -> tuple[str, str]:
    """Name and fingerprint of a file that is read."""
    return (file.name, file.id) if isinstance(file, ModelFile) else (file.name, sha256(file))


class Run:
    """Records by name, written after each one. A run that was cut off goes on where it stopped if the same is asked for
    again.

    Parameters
    ----------
    path : Path or None
        The JSON file; None keeps everything in memory.
    kind : str
        The subcommand.
    asked : dict
        All that the numbers depend on, as JSON has it.
    inputs : sequence of Path or ModelFile
        The files that are read: their contents count, too.

    Raises
    ------
    ArgumentError
        The file holds another run, or there is no such folder.
    """

    def __init__(self, path: Path | None, kind: str, asked: dict[str, Any], inputs: Sequence[Path | ModelFile] = ()):
        self.path = path
        self.data: dict[str, Any] = {
            "kind": kind,
            "asked": json.loads(json.dumps(asked)),
            "command": command_line(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "version": __version__,
            "upstream_commit": upstream_commit(),
            "build": build(),
            "inputs": dict(map(_input, inputs)),
            "records": {},
        }
        if path is not None and not path.parent.is_dir():
            raise ArgumentError(
                f"{path}: expected a folder to write to, got none of the name {path.parent}; make it first"
            )
        if path is not None and path.exists():
            there = read(path)
            differ = [
                key
                for key in ("kind", "asked", "inputs", "version", "build", "upstream_commit", "machine")
                if there.get(key) != self.data[key]
            ]
            if differ:
                raise ArgumentError(
                    f"{path}: expected the same run to go on with, got one with another {', '.join(differ)}; name "
                    "another file"
                )
            self.data = there

    @property
    def records(self) -> dict[str, Any]:
        return self.data["records"]

    def record(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of that name, measured only if the run has none."""
        if name not in self.records:
            self.records[name] = json.loads(json.dumps(measure()))
            if self.path is not None:
                part = self.path.with_name(self.path.name + ".part")
                part.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
                part.replace(self.path)
        return self.records[name]


def read(path: Path) -> dict[str, Any]:
    """The file of a run."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (
            isinstance(data, dict)
            and isinstance(data.get("records"), dict)
            and {"kind", "asked", "command", "date", "version", "upstream_commit", "machine"} <= data.keys()
        ):
            return data
    except ValueError:
        pass
    raise ArgumentError(f"{path}: expected the JSON of a bench run, got something else; name another file")

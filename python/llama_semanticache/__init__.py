"""llama_cpp.Llama with a KV cache that is compressed while it runs.

    from llama_semanticache import Llama
    llm = Llama("model.gguf", n_ctx=32768, kv_compress="semanticache", kv_ratio=0.25)

`llama_cpp` loads the patched library then, whichever of the two is imported first. Only where llama-cpp-python came
with libraries of its own, this package must be the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._native import point_llama_cpp_here, upstream_commit
from .errors import (
    ArgumentError,
    ContextOverflowError,
    DownloadError,
    LibraryError,
    ModelFileError,
    ProfileError,
    SemanticCacheError,
    StateError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .llama import KVStats, Llama

    __version__: str

__all__ = [
    "ArgumentError",
    "ContextOverflowError",
    "DownloadError",
    "KVStats",
    "LibraryError",
    "Llama",
    "ModelFileError",
    "ProfileError",
    "SemanticCacheError",
    "StateError",
    "UnsupportedModelError",
    "upstream_commit",
]

point_llama_cpp_here()


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    # llama_cpp takes a second to import, the version a tenth of one; what only looks at files does without
    if name in ("Llama", "KVStats"):
        from . import llama

        return getattr(llama, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("llama-semanticache")
        except PackageNotFoundError:  # run from a source tree
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Lets `import llama_cpp` find the patched library where it has none of its own, whichever package is imported first.

llama_semanticache.pth imports this whenever Python starts, so it must cost next to nothing, and must not fail.
"""

import sys

_LIBRARIES = ("libllama.so", "libllama.dylib", "libllama.dll", "llama.dll")


class _Finder:
    """Asked for every module before all other finders; finds none, but prepares for llama_cpp."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "llama_cpp":
            try:  # noqa: SIM105  contextlib would be imported whenever Python starts
                _prepare()
            except Exception:  # llama_cpp says itself that it has no library
                pass


def _prepare() -> None:
    """Import our package, which says where the library is, unless llama_cpp has its own or the user has chosen one."""
    import os
    from importlib.machinery import PathFinder

    if "LLAMA_CPP_LIB_PATH" in os.environ:
        return
    spec = PathFinder.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = os.path.join(next(iter(spec.submodule_search_locations)), "lib")
    if not any(os.path.exists(os.path.join(folder, name)) for name in _LIBRARIES):
        import llama_semanticache  # noqa: F401


sys.meta_path.insert(0, _Finder)

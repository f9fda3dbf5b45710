"""Errors of llama_semanticache. Every message says what was expected, what was found and what to do next."""

from __future__ import annotations


class SemanticCacheError(Exception):
    """Base of all errors that this package raises on purpose."""


class ArgumentError(SemanticCacheError, ValueError):
    """A parameter is out of range or contradicts another one."""


class UnsupportedModelError(SemanticCacheError, ValueError):
    """The model's cache cannot be compressed (recurrent, ALiBi, MLA, embeddings)."""


class ProfileError(SemanticCacheError, ValueError):
    """A profile is missing, unreadable, or belongs to another model."""


class StateError(SemanticCacheError, RuntimeError):
    """A saved state does not fit this model or its settings, or a call does not fit the contents of the cache."""


class ModelFileError(SemanticCacheError, ValueError):
    """A model name is unknown, or a file is not a readable, complete GGUF file."""


class ContextOverflowError(SemanticCacheError, ValueError):
    """The tokens do not fit into n_ctx."""


class LibraryError(SemanticCacheError, ImportError):
    """The patched llama.cpp library is missing or does not fit this package."""


class DownloadError(SemanticCacheError, RuntimeError):
    """A model could not be fetched or is not the file that was pinned."""

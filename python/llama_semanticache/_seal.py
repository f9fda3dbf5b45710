"""The checksum of a saved state: what was damaged on its way is refused before llama.cpp reads any of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import StateError

_MAGIC = b"kvstate1"
_DIGEST_BYTES = 16


def seal(data: bytes, tokens: npt.ArrayLike) -> bytes:
    """The library's state with a checksum of it and of the tokens behind it.

    Parameters
    ----------
    data : bytes
        What llama_state_get_data() wrote.
    tokens : array_like of int [n_tokens]
        The tokens that the cache stands for.
    """
    return b"".join([data, _MAGIC, _digest(data, tokens)])


def unseal(sealed: bytes | Sequence[int], tokens: npt.ArrayLike) -> bytes:
    """The library's state; the inverse of `seal`.

    Raises
    ------
    StateError
        There is no checksum, as in states that versions before 0.1 saved, or another.
    """
    sealed = bytes(sealed)
    at = len(sealed) - len(_MAGIC) - _DIGEST_BYTES
    data, magic, digest = sealed[: max(0, at)], sealed[max(0, at) : -_DIGEST_BYTES], sealed[-_DIGEST_BYTES:]
    if magic != _MAGIC:
        raise StateError(
            "state: expected one with a checksum, got one without: it is damaged or of an earlier version; save it "
            "again, the cache is as it was"
        )
    if digest != _digest(data, tokens):
        raise StateError(
            "state: expected its checksum, got another: it is damaged; save it again, the cache is as it was"
        )
    return data


def _digest(data: bytes, tokens: npt.ArrayLike) -> bytes:
    digest = hashlib.blake2b(data, digest_size=_DIGEST_BYTES)
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return digest.digest()

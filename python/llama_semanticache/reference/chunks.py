"""Chunks: runs of tokens that end with a delimiter. Clusters never cross a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DELIMITERS = tuple(c.encode() for c in ".!?;:,\n{}\u3002\uff01\uff1f\uff1b\uff1a\uff0c\u3001\u2026\uff0e")
"""UTF-8 bytes of the characters that end a chunk: Latin, code, CJK and full-width forms."""


def delimiter_table(pieces: Sequence[bytes], is_control: Sequence[bool]) -> np.ndarray:
    """Tell for every token of a vocabulary whether it ends a chunk.

    A token does if its text, without trailing spaces (U+0020 only), is not empty and ends in one of `DELIMITERS`, or if
    it is a control token.

    Parameters
    ----------
    pieces : sequence of bytes, length n_vocab
        Text of every token in UTF-8. A token may hold a part of a character.
    is_control : sequence of bool, length n_vocab

    Returns
    -------
    ndarray of bool, shape [n_vocab]
    """
    if len(pieces) != len(is_control):
        raise ValueError(
            f"expected one control flag per token ({len(pieces)}), got {len(is_control)}; pass both for the whole "
            "vocabulary"
        )
    return np.array(
        [bool(c) or p.rstrip(b" ").endswith(DELIMITERS) for p, c in zip(pieces, is_control, strict=True)], dtype=bool
    )


def chunk_ids(is_delimiter: Sequence[bool], n_chunk: int, first_id: int) -> np.ndarray:
    """Number the chunks of the new rows of a pass.

    A chunk ends after a delimiter token or when it is `n_chunk` tokens long. Every pass begins a new chunk: the next
    one starts at the last id plus one.

    Parameters
    ----------
    is_delimiter : sequence of bool, length n_new
        Whether each token, in position order, is a delimiter.
    n_chunk : int
        Longest chunk, tokens.
    first_id : int
        Id of the first chunk.

    Returns
    -------
    ndarray of int32, shape [n_new]
        Non-decreasing.
    """
    if n_chunk < 1:
        raise ValueError(f"expected n_chunk >= 1, got {n_chunk}; use 32 for the default")
    ids = np.empty(len(is_delimiter), dtype=np.int32)
    chunk, length, ended = first_id, 0, False
    for i, delimiter in enumerate(is_delimiter):
        if ended:
            chunk, length = chunk + 1, 0
        ids[i] = chunk
        length += 1
        ended = bool(delimiter) or length == n_chunk
    return ids

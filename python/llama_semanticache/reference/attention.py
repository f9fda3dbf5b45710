"""Proportional attention: one softmax over rows, each of which may stand for many tokens.

The bias of a row is the log of the attention mass that it stands for, relative to its own key; it is added to the
logit. A row with bias log n acts exactly as n copies of itself. This is the reference for the attention kernels of
every backend.
"""

from __future__ import annotations

import numpy as np


def logits(q, k, scale: float, softcap: float = 0.0) -> np.ndarray:
    """Logits without bias: y = scale * q.k, then softcap * tanh(y / softcap) if softcap is not 0.

    Parameters
    ----------
    q : array_like, shape [..., d_k]
    k : array_like, shape [T, d_k]

    Returns
    -------
    ndarray of float64, shape [..., T]
    """
    y = scale * (np.asarray(q, dtype=np.float64) @ np.asarray(k, dtype=np.float64).T)
    return softcap * np.tanh(y / softcap) if softcap else y


def logsumexp(x) -> np.ndarray:
    """log(sum(exp(x))) over the last axis, safe against overflow; at least one entry must be finite."""
    top = np.max(x, axis=-1, keepdims=True)
    return np.log(np.sum(np.exp(x - top), axis=-1)) + top[..., 0]


def attend(q, k, v, bias, scale: float, softcap: float = 0.0, sinks=None, mask=None) -> np.ndarray:
    """Attend to all rows of one kv head.

    Parameters
    ----------
    q : array_like, shape [n_q, gqa, d_k]
        RoPE'd queries of the query heads that share this kv head.
    k : array_like, shape [T, d_k]
    v : array_like, shape [T, d_v]
    bias : array_like, shape [T]
        Added to the logit after the softcap; -inf hides a row.
    scale, softcap : float
        See `logits`.
    sinks : array_like, shape [gqa], optional
        One logit per query head that takes its share of the softmax and brings no value.
    mask : array_like, shape [n_q, T], optional
        Added to the logits like the bias; 0 or -inf in a causal mask. Every query must see a row or have a sink logit.

    Returns
    -------
    ndarray of float64, shape [n_q, gqa, d_v]
    """
    q = np.asarray(q, dtype=np.float64)
    x = logits(q, k, scale, softcap) + np.asarray(bias, dtype=np.float64)
    if mask is not None:
        x = x + np.asarray(mask, dtype=np.float64)[:, None, :]
    denominator = x
    if sinks is not None:
        column = np.broadcast_to(np.asarray(sinks, dtype=np.float64)[None, :, None], (*x.shape[:2], 1))
        denominator = np.concatenate([x, column], axis=-1)
    p = np.exp(x - logsumexp(denominator)[..., None])
    return p @ np.asarray(v, dtype=np.float64)

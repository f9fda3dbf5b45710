"""The frame that a head's keys are quantized in: k = mean + scale * H(stored), H the rotation of the rows.

What all keys share takes no bits, and the error falls where queries do not look. The first pass makes the frame, which
then stays: rows are never quantized again for another one.
"""

from __future__ import annotations

import numpy as np

from .lookahead import rotate

FLOOR = 1e-3
"""Least deviation and reach of a channel, as a part of the greatest."""

SCALE_MIN, SCALE_MAX = 2.0**-10, 2.0**15
"""Range of a scale."""


def mean_turn(inv_freq, first: int, n: int) -> np.ndarray:
    """Mean of the turns to the positions first, ..., first + n - 1 as complex numbers; shape [n_rot / 2].

    A geometric series of e^(i w): shorter than 1 the faster a pair turns.
    """
    w = np.asarray(inv_freq, dtype=np.float64)
    half = np.sin(w / 2)
    length = np.divide(np.sin(w * n / 2), half * n, out=np.ones_like(w), where=half != 0)
    return length * np.exp(1j * w * (first + (n - 1) / 2))


def key_frame(k, pos, q, inv_freq, neox: bool, first: int, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of a head's keys.

    The values of a block share one step, so the error is about `scale` times the same noise in every channel, and the
    noise is as large as the stored values: the mean over the channels of (dev / scale)^2. What queries make of it, the
    sum of (ask * scale)^2 times that, is least for scale^2 = dev / ask (Cauchy and Schwarz).

    RoPE turns a channel pair of all keys with the position: their mean over a whole context is that of the keys turned
    back to position 0, times the mean of the turns. What is thereby left out adds to dev.

    Parameters
    ----------
    k : array_like, shape [n, d_k]
        RoPE'd keys of the stage, without sinks.
    pos : array_like of int, shape [n]
    q : array_like, shape [m, d_k]
        RoPE'd queries; with none, ask is 1 / dev.
    inv_freq : array_like, shape [n_rot / 2]
        Angle per position, radians.
    neox : bool
        Pairing of channels, see `rotate`.
    first, n_ctx : int
        The positions that the text may take: first, ..., first + n_ctx - 1.

    Returns
    -------
    mean, scale : ndarray of float64, shape [d_k]
        Stored values have a mean square of 1.
    """
    k, q, pos = np.asarray(k, dtype=np.float64), np.asarray(q, dtype=np.float64), np.asarray(pos)
    n_rot = 2 * len(inv_freq)
    one, two = (
        (np.arange(n_rot // 2), np.arange(n_rot // 2) + n_rot // 2)
        if neox
        else (
            np.arange(0, n_rot, 2),
            np.arange(1, n_rot, 2),
        )
    )

    def rms(square):
        square[one] = square[two] = (square[one] + square[two]) / 2
        root = np.sqrt(square)
        top = np.max(root)
        return np.maximum(root, FLOOR * top) if top > 0 else np.ones_like(root)

    back = rotate(k, -pos, inv_freq, neox)
    mean = np.mean(back, axis=0)
    square = np.mean((back - mean) ** 2, axis=0)
    turn = mean_turn(inv_freq, first, n_ctx)
    z = (mean[one] + 1j * mean[two]) * turn
    lost = np.maximum(1 - np.abs(turn) ** 2, 0) * (mean[one] ** 2 + mean[two] ** 2) / 2
    square[one] += lost
    square[two] += lost
    mean[one], mean[two] = z.real, z.imag

    dev = rms(square)
    ask = rms(np.mean(q**2, axis=0)) if len(q) else 1 / dev
    unit = np.sqrt(np.mean(dev * ask))
    return mean, np.clip(unit * np.sqrt(dev / ask), SCALE_MIN, SCALE_MAX)

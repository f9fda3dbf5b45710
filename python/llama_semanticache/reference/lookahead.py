"""Look-ahead: queries are rotated forward, so that they see the whole cache from positions yet to come."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """Mix a 64-bit integer (Steele, Lea and Flood's splitmix64, one step from state `x`); arithmetic wraps at 2**64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    z = x
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def horizon_positions(pos, n_horizon: int, seed: int) -> np.ndarray:
    """Draw how far beyond the present each query looks from: u(pos) = splitmix64(seed + pos) mod n_horizon.

    Parameters
    ----------
    pos : array_like of int, shape [n_q]
        Positions of the queries' own tokens.
    n_horizon : int
        u lies in [0, n_horizon); positions.
    seed : int
        0 <= seed < 2**64. The sum with the position wraps around.

    Returns
    -------
    ndarray of int64, shape [n_q]
    """
    if n_horizon < 1:
        raise ValueError(f"expected n_horizon >= 1, got {n_horizon}; use 1 to look from the present only")
    return np.array([splitmix64((seed + int(p)) & _MASK) % n_horizon for p in pos], dtype=np.int64)


def rotate(q, delta, inv_freq, rope_neox: bool) -> np.ndarray:
    """Rotate RoPE'd vectors by further positions; RoPE is additive, so rotate(rotate(q, a), b) is rotate(q, a + b).

    Parameters
    ----------
    q : array_like, shape [n_q, ..., d]
    delta : array_like of int, shape [n_q]
        Positions to rotate by, one per entry of the first axis.
    inv_freq : array_like, shape [n_rot / 2]
        Angle per position of each pair, radians. Empty: no RoPE, q is returned unchanged.
    rope_neox : bool
        Which dimensions form pair i: (i, i + n_rot / 2) if true, (2 i, 2 i + 1) if false. Dimensions from n_rot on
        stay.

    Returns
    -------
    ndarray of float64, shape of q
    """
    q = np.array(q, dtype=np.float64)
    inv_freq = np.asarray(inv_freq, dtype=np.float64)
    n_pair = len(inv_freq)
    if 2 * n_pair > q.shape[-1]:
        raise ValueError(
            f"expected at most {q.shape[-1] // 2} angles for vectors of {q.shape[-1]}, got {n_pair}; inv_freq holds "
            "one per pair"
        )
    i = np.arange(n_pair)
    first, second = (i, i + n_pair) if rope_neox else (2 * i, 2 * i + 1)

    angle = np.multiply.outer(np.asarray(delta, dtype=np.float64), inv_freq)  # [n_q, n_pair]
    angle = angle.reshape(angle.shape[0], *[1] * (q.ndim - 2), n_pair)
    a, b = q[..., first], q[..., second]
    q[..., first] = a * np.cos(angle) - b * np.sin(angle)
    q[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return q

"""Profile: the share of the budget that each kv head gets, a property of the model that is measured once.

A share is the part of a head's candidates that survive when one threshold on the score is applied to all heads. It is
measured at a few ratios (the knots) and interpolated between them.

File format, text with LF line ends::

    semcache-profile 1
    model_id <id>
    n_text <number of texts>
    ratios 0.5 0.25 0.125 0.0625 0.03125
    head <il> <head> <share at each ratio, %.6f>

with one line per kv head, ordered by il and head. The id is the rest of its line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RATIOS = (0.5, 0.25, 0.125, 0.0625, 0.03125)
"""Ratios at which a profile is measured."""

N_BISECT, SCALE_MAX = 200, 1e6


@dataclass(frozen=True)
class Profile:
    """Measured shares.

    Attributes
    ----------
    model_id : str
        One line, not empty.
    n_text : int
        Texts that the shares are the mean of.
    ratios : tuple of float, length n_ratio
        1 > ratios > 0, strictly decreasing.
    heads : tuple of (il, head)
        Increasing.
    shares : ndarray of float64, shape [n_head, n_ratio]
        Each in [0, 1].
    """

    model_id: str
    n_text: int
    ratios: tuple[float, ...]
    heads: tuple[tuple[int, int], ...]
    shares: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "shares", np.asarray(self.shares, dtype=np.float64))
        if not self.model_id or self.model_id != self.model_id.strip() or "\n" in self.model_id:
            raise ValueError(f"expected a model_id on one line without spaces around it, got {self.model_id!r}; calibrate again")
        if self.n_text < 1:
            raise ValueError(f"expected n_text >= 1, got {self.n_text}; calibrate on at least one text")
        if not self.ratios or not all(1 > a > b for a, b in zip(self.ratios, (*self.ratios[1:], 0.0))):
            raise ValueError(f"expected ratios that fall from below 1 to above 0, got {self.ratios}; calibrate again")
        if not self.heads or any(a >= b for a, b in zip(self.heads, self.heads[1:])):
            raise ValueError("expected at least one head, each once and ordered by (il, head), got another order; calibrate again")
        if self.shares.shape != (len(self.heads), len(self.ratios)):
            raise ValueError(f"expected shares [{len(self.heads)}, {len(self.ratios)}], got {list(self.shares.shape)}; calibrate again")
        if not np.all((self.shares >= 0) & (self.shares <= 1)):
            raise ValueError("expected shares in [0, 1], got one outside; calibrate again")


def write_profile(path, profile: Profile) -> None:
    """Write the file; shares are rounded to 6 digits."""
    lines = ["semcache-profile 1", f"model_id {profile.model_id}", f"n_text {profile.n_text}",
             "ratios " + " ".join(f"{r:g}" for r in profile.ratios)]
    for (il, head), shares in zip(profile.heads, profile.shares):
        lines.append(f"head {il} {head} " + " ".join(f"{s:.6f}" for s in shares))
    Path(path).write_bytes(("\n".join(lines) + "\n").encode())


def read_profile(path) -> Profile:
    """Read the file.

    Raises
    ------
    ValueError
        The file is not a profile of version 1, or a line of it is malformed; the message names the line.
    """
    lines = Path(path).read_bytes().decode(errors="replace").removesuffix("\n").split("\n")

    def field(number: int, key: str, form: str, parse):
        line = lines[number] if number < len(lines) else ""
        name, _, value = line.partition(" ")
        try:
            if name == key:
                return parse(value)
        except ValueError:
            pass
        raise ValueError(f"{path}, line {number + 1}: expected '{key} {form}', got {line!r}; calibrate again")

    def version_1(value: str):
        if value != "1":
            raise ValueError

    def head_line(value: str):
        il, head, *values = value.split()
        if len(values) != len(ratios):
            raise ValueError
        return (int(il), int(head)), [float(s) for s in values]

    field(0, "semcache-profile", "1", version_1)
    model_id = field(1, "model_id", "<id>", str)
    n_text = field(2, "n_text", "<number of texts>", int)
    ratios = field(3, "ratios", "<numbers>", lambda value: tuple(float(r) for r in value.split()))
    heads = [field(i, "head", f"<il> <head> <{len(ratios)} shares>", head_line) for i in range(4, len(lines))]
    try:
        return Profile(model_id, n_text, ratios, tuple(h for h, _ in heads), np.array([s for _, s in heads]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def interpolate(profile: Profile, ratio: float) -> np.ndarray:
    """Shares at any ratio: linear in log2(ratio) between the knots.

    The knot (ratio 1, share 1) is implied. Below the smallest knot r_min the shares fall as ratio / r_min.

    Returns
    -------
    ndarray of float64, shape [n_head]
    """
    _check_ratio(ratio)
    knots = (1.0, *profile.ratios)
    shares = np.concatenate([np.ones((len(profile.heads), 1)), profile.shares], axis=1)
    if ratio <= knots[-1]:
        return shares[:, -1] * (ratio / knots[-1])
    i = next(i for i in range(len(knots) - 1) if ratio >= knots[i + 1])
    t = (math.log2(ratio) - math.log2(knots[i + 1])) / (math.log2(knots[i]) - math.log2(knots[i + 1]))
    return t * shares[:, i] + (1 - t) * shares[:, i + 1]


def equal_shares(ratio: float, n_head: int) -> np.ndarray:
    """Shares without a profile: the ratio for every head."""
    _check_ratio(ratio)
    return np.full(n_head, ratio)


def budgets(shares, ratio: float, n_ctx: int, n_sink: int, n_chunk: int = 32) -> np.ndarray:
    """Rows of every kv head, sinks included; their sum is round(ratio * n_ctx * n_head).

    rows = clamp(lambda * share * n_ctx, lo, hi) with lo = min(n_ctx, n_sink + n_chunk), hi = n_ctx and one lambda for all
    heads, found by bisection so that the sum fits. The rows are rounded down and the missing ones handed out one by one,
    to the largest fraction first (ties: lower index), round after round if need be, never above hi.

    Parameters
    ----------
    shares : array_like, shape [n_head]
        All kv heads of all compressed layers.
    ratio : float
        0 < ratio <= 1.
    n_ctx, n_sink, n_chunk : int
        Tokens.

    Returns
    -------
    ndarray of int64, shape [n_head]

    Raises
    ------
    ValueError
        There are not even lo rows for every head.
    """
    _check_ratio(ratio)
    shares = np.asarray(shares, dtype=np.float64)
    n_rows = _round(ratio * n_ctx * len(shares))
    lo, hi = min(n_ctx, n_sink + n_chunk), n_ctx
    if lo * len(shares) > n_rows:
        raise ValueError(f"expected at least {lo} rows per kv head (n_sink + n_chunk), got {n_rows} rows for {len(shares)} heads; "
                         "raise the ratio or n_ctx")

    def rows(scale):
        return np.clip(scale * shares * n_ctx, lo, hi)

    below, above = 0.0, SCALE_MAX
    for _ in range(N_BISECT):
        mid = (below + above) / 2
        if np.sum(rows(mid)) > n_rows:
            above = mid
        else:
            below = mid
    wanted = rows(below)
    out = np.floor(wanted).astype(np.int64)
    order = np.argsort(-(wanted - out), kind="stable")
    while np.sum(out) < n_rows:
        for h in order:
            if np.sum(out) < n_rows and out[h] < hi:
                out[h] += 1
    return out


def shares_of_scores(scores, ratios=RATIOS) -> np.ndarray:
    """Shares on one text: the part of each head's candidates among the best of all heads together.

    Parameters
    ----------
    scores : array_like, shape [n_head, n_cand]
        s_use * s_dev of `compress.score` with the whole text in the stage, nothing compressed. The candidates are all
        tokens but the sinks and the last n_window.
    ratios : sequence of float, length n_ratio
        At each, the round(ratio * n_head * n_cand) best survive; of equal scores the lower (head, candidate).

    Returns
    -------
    ndarray of float64, shape [n_head, n_ratio]
    """
    scores = np.asarray(scores, dtype=np.float64)
    n_head, n_cand = scores.shape
    order = np.argsort(-scores.ravel(), kind="stable")
    shares = np.empty((n_head, len(ratios)))
    for i, ratio in enumerate(ratios):
        best = order[:_round(ratio * n_head * n_cand)]
        shares[:, i] = np.bincount(best // n_cand, minlength=n_head) / n_cand
    return shares


def calibrate(texts, ratios=RATIOS) -> np.ndarray:
    """Shares of a model: the mean over texts of `shares_of_scores`; texts may differ in length."""
    return np.mean([shares_of_scores(scores, ratios) for scores in texts], axis=0)


def _round(x: float) -> int:
    """Nearest integer, halves up."""
    return math.floor(x + 0.5)


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"expected 0 < ratio <= 1, got {ratio}; 0.25 keeps a quarter of the rows")

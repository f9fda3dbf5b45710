"""Profile: how far each kv head is off with how many rows, a property of the model that is measured once.

Errors are measured at a few parts of the rows (the knots) by `calibrate.output_errors`, divided by the size of the
layer's residual stream (the median over the tokens of the norm of the layer's output), and meaned over texts. Where a
norm follows the attention's projection (Gemma 2 and 3, OLMo 2, ...), an error counts in proportion to the outputs
themselves: times the square of the median norm of what that norm returns, over that of the heads' outputs. Squared and
divided by the plain, not the squared size, they follow what the compression of the single head does to the model's
distribution; see docs/decisions.md, 21.

File format, text with LF line ends::

    semcache-profile 3
    model_id <id>
    n_text <number of texts>
    parts 0.0078125 0.015625 0.03125 0.0625 0.125 0.25 0.5
    head <il> <head> <error at each part, %.4e>

with one line per kv head, ordered by il and head. The id is the rest of its line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

PARTS = (0.0078125, 0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5)
"""Parts of the rows at which a profile is measured."""

N_GRID = 64
"""Steps from the least to the greatest budget in which rows are given out."""


@dataclass(frozen=True)
class Profile:
    """Measured errors.

    Attributes
    ----------
    model_id : str
        One line, not empty.
    n_text : int
        Texts that the errors are the mean of.
    parts : tuple of float, length n_part
        0 < parts < 1, strictly increasing.
    heads : tuple of (il, head)
        Increasing.
    errors : ndarray of float64, shape [n_head, n_part]
        Each at least 0.
    """

    model_id: str
    n_text: int
    parts: tuple[float, ...]
    heads: tuple[tuple[int, int], ...]
    errors: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "errors", np.asarray(self.errors, dtype=np.float64))
        if not self.model_id or self.model_id != self.model_id.strip() or "\n" in self.model_id:
            raise ValueError(
                f"expected a model_id on one line without spaces around it, got {self.model_id!r}; calibrate again"
            )
        if self.n_text < 1:
            raise ValueError(f"expected n_text >= 1, got {self.n_text}; calibrate on at least one text")
        if not self.parts or not all(0 < a < b for a, b in pairwise((*self.parts, 1.0))):
            raise ValueError(f"expected parts that rise from above 0 to below 1, got {self.parts}; calibrate again")
        if not self.heads or any(a >= b for a, b in pairwise(self.heads)):
            raise ValueError(
                "expected at least one head, each once and ordered by (il, head), got another order; calibrate again"
            )
        if self.errors.shape != (len(self.heads), len(self.parts)):
            raise ValueError(
                f"expected errors [{len(self.heads)}, {len(self.parts)}], got {list(self.errors.shape)}; calibrate "
                "again"
            )
        if not np.all((self.errors >= 0) & np.isfinite(self.errors)):
            raise ValueError("expected errors of at least 0, got another; calibrate again")


def write_profile(path, profile: Profile) -> None:
    """Write the file; errors are rounded to 5 digits."""
    lines = [
        "semcache-profile 3",
        f"model_id {profile.model_id}",
        f"n_text {profile.n_text}",
        "parts " + " ".join(f"{x:g}" for x in profile.parts),
    ]
    for (il, head), errors in zip(profile.heads, profile.errors, strict=True):
        lines.append(f"head {il} {head} " + " ".join(f"{x:.4e}" for x in errors))
    Path(path).write_bytes(("\n".join(lines) + "\n").encode())


def read_profile(path) -> Profile:
    """Read the file.

    Raises
    ------
    ValueError
        The file is not a profile of version 3, or a line of it is malformed; the message names the line.
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

    def version(value: str):
        if value != "3":
            raise ValueError

    def head_line(value: str):
        il, head, *values = value.split()
        if len(values) != len(parts):
            raise ValueError
        return (int(il), int(head)), [float(s) for s in values]

    field(0, "semcache-profile", "3", version)
    model_id = field(1, "model_id", "<id>", str)
    n_text = field(2, "n_text", "<number of texts>", int)
    parts = field(3, "parts", "<numbers>", lambda value: tuple(float(x) for x in value.split()))
    heads = [field(i, "head", f"<il> <head> <{len(parts)} errors>", head_line) for i in range(4, len(lines))]
    try:
        return Profile(model_id, n_text, parts, tuple(h for h, _ in heads), np.array([s for _, s in heads]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def error_at(parts, errors, part: float) -> float:
    """Error of one head at any part of its rows: a power law between the knots, below the first as there, and from the
    last one linear to none at part 1. Where a knot has no error, so has what lies before it, back to the next knot.

    Parameters
    ----------
    parts, errors : sequence of float, length n_part
    """
    if part <= parts[0]:
        return errors[0]
    if part >= parts[-1]:
        return errors[-1] * max(0.0, 1 - part) / (1 - parts[-1])
    i = next(i for i in range(1, len(parts)) if part < parts[i])
    a, b = errors[i - 1], errors[i]
    if a <= 0 or b <= 0:
        return b
    return a * (b / a) ** (math.log(part / parts[i - 1]) / math.log(parts[i] / parts[i - 1]))


def steps(parts, errors, n_ctx: int, lo: int) -> list[tuple[int, float]]:
    """Lower convex hull of a head's error over its rows, as (rows, error) from `lo` to `n_ctx` rows.

    The error is taken at rows that rise geometrically in `N_GRID` steps, and never rises with the rows (if it was
    measured so, that is noise).

    Returns
    -------
    list of (rows, error)
        Every step takes away less error per row than the one before it.
    """
    errors = np.minimum.accumulate(errors)
    hull: list[tuple[int, float]] = []

    def gain(a, b):
        return (a[1] - b[1]) / (b[0] - a[0])

    for j in range(N_GRID + 1):
        rows = _round(lo * (n_ctx / lo) ** (j / N_GRID))
        if hull and rows <= hull[-1][0]:
            continue
        point = (rows, error_at(parts, errors, rows / n_ctx))
        while len(hull) > 1 and gain(hull[-2], point) >= gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def budgets(profile: Profile, ratio: float, n_ctx: int, n_sink: int, n_chunk: int = 32) -> np.ndarray:
    """Rows of every kv head, sinks included: the smallest sum of errors with round(ratio * n_ctx * n_head) rows in all.

    Every head starts with lo = min(n_ctx, n_sink + n_chunk) rows. The steps of all heads' hulls are taken in the order
    of what a row takes away (ties: lower head first) until the rows are used up; the last step is taken in part.

    Parameters
    ----------
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
    n_head = len(profile.heads)
    lo = _least(ratio, n_ctx, n_sink, n_chunk, n_head)
    taken = []
    for head, errors in enumerate(profile.errors):
        hull = steps(profile.parts, errors, n_ctx, lo)
        taken += [((a[1] - b[1]) / (b[0] - a[0]), head, b[0] - a[0]) for a, b in pairwise(hull)]
    out = np.full(n_head, lo, dtype=np.int64)
    left = _round(ratio * n_ctx * n_head) - lo * n_head
    for _, head, n_rows in sorted(taken, key=lambda step: -step[0]):
        out[head] += min(n_rows, left)
        left -= min(n_rows, left)
    return out


def equal_budgets(n_head: int, ratio: float, n_ctx: int, n_sink: int, n_chunk: int = 32) -> np.ndarray:
    """Rows without a profile: the same for every head, one more for the first ones until round(ratio * n_ctx * n_head)
    are out.

    Raises
    ------
    ValueError
        As in `budgets`.
    """
    _least(ratio, n_ctx, n_sink, n_chunk, n_head)
    n_rows = _round(ratio * n_ctx * n_head)
    return n_rows // n_head + (np.arange(n_head) < n_rows % n_head)


def _least(ratio: float, n_ctx: int, n_sink: int, n_chunk: int, n_head: int) -> int:
    """Least rows of a head."""
    if not 0 < ratio <= 1:
        raise ValueError(f"expected 0 < ratio <= 1, got {ratio}; 0.25 keeps a quarter of the rows")
    lo, n_rows = min(n_ctx, n_sink + n_chunk), _round(ratio * n_ctx * n_head)
    if lo * n_head > n_rows:
        raise ValueError(
            f"expected at least {lo} rows per kv head (n_sink + n_chunk), got {n_rows} rows for {n_head} heads; "
            "raise the ratio or n_ctx"
        )
    return lo


def _round(x: float) -> int:
    """Nearest integer, halves up."""
    return math.floor(x + 0.5)

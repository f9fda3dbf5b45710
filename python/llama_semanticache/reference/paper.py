"""The baselines: the method as its paper describes it, and streaming (sinks and the newest tokens).

Both read the same `PassInput` as the pass and need no queries. Their rows have no score: s_use = 0. With no more
candidates than the budget nothing changes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .compress import HeadRows, PassInput, PassResult, check_budget, unchanged

TAU_MIN, TAU_MAX = -1.001, 1.001
"""Start of the bisection: just outside the range of a cosine."""

N_BISECT = 20


def compress_head_paper(inp: PassInput, budget: int) -> PassResult:
    """Cluster every chunk by cosine similarity, greedy seeds in reading order, plain means, bias log n.

    Returns
    -------
    PassResult
        At most `budget` rows; the row of a cluster takes the place of its seed.
    """
    check_budget(budget)
    rows = _without_scores(inp.candidates())
    if len(rows) <= budget:
        return unchanged(rows)
    seed_of = np.full(len(rows), -1, dtype=np.int64)
    for chunk, chunk_budget in chunk_budgets(rows.chunk, rows.n_tok, budget):
        index = np.flatnonzero(rows.chunk == chunk)
        seed_of[index] = index[threshold_clusters(cosines(rows.k[index]), chunk_budget)]
    seeds = np.unique(seed_of[seed_of >= 0])
    member_of = np.where(seed_of >= 0, np.searchsorted(seeds, seed_of), -1)
    return PassResult(_plain_means(rows, seeds, member_of), seeds, member_of)


def compress_head_streaming(inp: PassInput, budget: int) -> PassResult:
    """Keep the newest `budget` candidates as they are and drop the rest."""
    check_budget(budget)
    rows = _without_scores(inp.candidates())
    n_drop = max(0, len(rows) - budget)
    member_of = np.arange(len(rows)) - n_drop
    member_of[:n_drop] = -1
    winner = np.arange(n_drop, len(rows))
    return PassResult(rows.take(winner), winner, member_of)


def chunk_budgets(chunk, n_tok, budget: int) -> list[tuple[int, int]]:
    """Rows for every chunk, in proportion to its tokens and at least one.

    While that is more than the budget, the oldest chunk (lowest id) is dropped whole.

    Parameters
    ----------
    chunk : ndarray of int, shape [n_cand]
    n_tok : ndarray of int, shape [n_cand]
    budget : int

    Returns
    -------
    list of (chunk id, rows), by increasing id
        The chunks that stay.
    """
    n = int(np.sum(n_tok))
    out = [(int(c), max(1, int(np.sum(n_tok[chunk == c])) * budget // n)) for c in np.unique(chunk)]
    while sum(b for _, b in out) > budget:
        out.pop(0)
    return out


def cosines(k) -> np.ndarray:
    """Cosine of every pair of keys, shape [n, n]; 0 with a key that is zero."""
    norm = np.sqrt(np.sum(k * k, axis=1))
    unit = k / np.where(norm > 0, norm, 1.0)[:, None]
    return unit @ unit.T


def greedy_clusters(cosine, tau: float) -> np.ndarray:
    """Seed of every row: the first unassigned row is a seed, and every unassigned row with cosine >= tau to it joins.

    Parameters
    ----------
    cosine : ndarray, shape [n, n]
    tau : float

    Returns
    -------
    ndarray of int64, shape [n]
    """
    seed_of = np.full(len(cosine), -1, dtype=np.int64)
    for seed in range(len(cosine)):
        if seed_of[seed] >= 0:
            continue
        seed_of[seed] = seed
        seed_of[(seed_of < 0) & (cosine[:, seed] >= tau)] = seed
    return seed_of


def threshold_clusters(cosine, budget: int) -> np.ndarray:
    """Greedy clusters of a chunk with the threshold found by bisection so that there are at most `budget` >= 1 of them.

    Returns
    -------
    ndarray of int64, shape [n]
        Seed of every row. If the chunk has no more rows than the budget, every row is its own.
    """
    if len(cosine) <= budget:
        return np.arange(len(cosine))
    low, high = TAU_MIN, TAU_MAX
    for _ in range(N_BISECT):
        mid = (low + high) / 2
        if len(np.unique(greedy_clusters(cosine, mid))) > budget:
            high = mid
        else:
            low = mid
    return greedy_clusters(cosine, low)


def _plain_means(rows: HeadRows, seeds, member_of) -> HeadRows:
    """Means weighted by the tokens that each row stands for, and the log of their sum as the bias."""
    out = rows.take(seeds)
    k, v, n_tok = out.k.copy(), out.v.copy(), out.n_tok.copy()
    for j in range(len(seeds)):
        members = np.flatnonzero(member_of == j)
        n_tok[j] = np.sum(rows.n_tok[members])
        if len(members) > 1:
            k[j] = rows.n_tok[members] @ rows.k[members] / n_tok[j]
            v[j] = rows.n_tok[members] @ rows.v[members] / n_tok[j]
    return replace(out, k=k, v=v, n_tok=n_tok, bias=np.log(n_tok))


def _without_scores(rows: HeadRows) -> HeadRows:
    return replace(rows, s_use=np.zeros(len(rows)))

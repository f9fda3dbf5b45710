"""One pass over one kv head. All heads are independent.

The rows of the head lie in the order

    n_sink sinks | n_core cores | n_new new rows, by position | n_win window

and T is their number. The candidates C are the cores and the new rows; a pass turns them into at most `budget` cores.
Sinks and window are attended to and never change. Indices of candidates count from the first core.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .attention import logits, logsumexp
from .lookahead import horizon_positions, rotate

WEIGHT_FLOOR = 1e-9
"""Added to the weight of every merged row, so that rows that no query looked at still have a mean."""

MASS_FLOOR = 1e-20
"""Least mass of a cluster whose log is taken."""

BIAS_MIN, BIAS_MAX = -6.0, 8.0
"""Range of a fitted bias."""

RIDGE = 10.0
"""Weight of the ridge on the fitted values."""

LEAST_KEPT = 1e-3
"""Share of a query's attention that a pass must leave for the query to take part in the fit of the values."""

VOTE_EVERY = 2
"""Of the tokens since the last pass, beginning with the first, one in so many has queries that vote."""

DISTINCT = 50
"""Percent of a head's rows that go to the keys least like the others, whatever their score."""

N_FIT = 320
"""Rows are merged by this many queries of a head at the most, or those of one token more."""


_ROW_DTYPES = {
    "k": np.float64,
    "v": np.float64,
    "bias": np.float64,
    "chunk": np.int32,
    "s_use": np.float64,
    "n_tok": np.int64,
}


def _to_arrays(frozen, dtypes) -> None:
    for name, dtype in dtypes.items():
        object.__setattr__(frozen, name, np.asarray(getattr(frozen, name), dtype=dtype))


@dataclass(frozen=True)
class HeadRows:
    """Rows of one kv head, in index order.

    Attributes
    ----------
    k : ndarray of float64, shape [n, d_k]
    v : ndarray of float64, shape [n, d_v]
    bias : ndarray of float64, shape [n]
        Added to the logits of the row.
    chunk : ndarray of int32, shape [n]
    s_use : ndarray of float64, shape [n]
        Attention that the row got, see `Scores`: the greatest of all passes.
    n_tok : ndarray of int64, shape [n]
        Tokens that the row stands for.
    """

    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray
    chunk: np.ndarray
    s_use: np.ndarray
    n_tok: np.ndarray

    def __post_init__(self):
        _to_arrays(self, _ROW_DTYPES)
        for name in _ROW_DTYPES:
            _expect(f"entries of {name}", len(self.k), len(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.k)

    def take(self, index) -> HeadRows:
        """Rows at `index`, in that order."""
        return HeadRows(
            self.k[index], self.v[index], self.bias[index], self.chunk[index], self.s_use[index], self.n_tok[index]
        )


@dataclass(frozen=True)
class Votes:
    """What the queries of a pass and of those before it say of the rows in the stage: new rows first, then the window.

    A token votes once, in the first pass after it came; a row gathers votes as long as it is in the stage.

    Attributes
    ----------
    n : ndarray of int64, shape [n_new + n_win]
        Tokens whose queries voted.
    p4, p : ndarray of float64, shape [n_new + n_win]
        Sums over their queries and query heads of the row's probability to the power of 4, and of the probability.
    """

    n: np.ndarray
    p4: np.ndarray
    p: np.ndarray

    def __len__(self) -> int:
        return len(self.n)

    def take(self, index) -> Votes:
        """Votes of the rows at `index`, in that order."""
        return Votes(self.n[index], self.p4[index], self.p[index])

    @staticmethod
    def none(n_rows: int) -> Votes:
        """Before the first pass."""
        return Votes(np.zeros(n_rows, dtype=np.int64), np.zeros(n_rows), np.zeros(n_rows))


@dataclass(frozen=True)
class PassInput:
    """What a pass reads of one kv head. Float arrays are taken as float64.

    Attributes
    ----------
    k : ndarray, shape [T, d_k]
        RoPE'd keys of all rows.
    v : ndarray, shape [T, d_v]
    bias : ndarray, shape [T]
        0 for sinks, new rows and window.
    n_sink, n_win : int
        Rows at the start and at the end that stay as they are.
    chunk : ndarray of int32, shape [n_cand]
        Non-decreasing.
    s_use : ndarray, shape [n_core]
        Use of the cores in earlier passes. Its length tells n_core.
    n_tok : ndarray of int64, shape [n_core]
        Tokens that the cores stand for.
    q : ndarray, shape [n_q, gqa, d_k]
        RoPE'd queries that vote in this pass: those of the tokens that came since the last one.
    pos_q : ndarray of int64, shape [n_q]
        Positions of these tokens.
    votes : Votes, optional
        Votes of earlier passes on new rows and window; by default there were none.
    """

    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray
    n_sink: int
    n_win: int
    chunk: np.ndarray
    s_use: np.ndarray
    n_tok: np.ndarray
    q: np.ndarray
    pos_q: np.ndarray
    votes: Votes = field(default_factory=lambda: Votes.none(0))

    def __post_init__(self):
        _to_arrays(self, {**_ROW_DTYPES, "q": np.float64, "pos_q": np.int64})
        _expect("rows of v", len(self.k), len(self.v))
        _expect("entries of bias", len(self.k), len(self.bias))
        _expect("entries of chunk", self.n_cand, len(self.chunk))
        _expect("entries of n_tok", self.n_core, len(self.n_tok))
        if not len(self.votes):
            object.__setattr__(self, "votes", Votes.none(self.n_new + self.n_win))
        _expect("votes", self.n_new + self.n_win, len(self.votes))
        _expect("query positions", len(self.q), len(self.pos_q))
        _expect("query length", self.k.shape[1], self.q.shape[2])

    @property
    def n_core(self) -> int:
        return len(self.s_use)

    @property
    def n_cand(self) -> int:
        return len(self.k) - self.n_sink - self.n_win

    @property
    def n_new(self) -> int:
        return self.n_cand - self.n_core

    @property
    def cand(self) -> slice:
        """The candidates among the rows."""
        return slice(self.n_sink, self.n_sink + self.n_cand)

    def candidates(self) -> HeadRows:
        """Cores and new rows. A new row stands for one token and has no score yet (0)."""
        return HeadRows(
            self.k[self.cand],
            self.v[self.cand],
            self.bias[self.cand],
            self.chunk,
            np.concatenate([self.s_use, np.zeros(self.n_new)]),
            np.concatenate([self.n_tok, np.ones(self.n_new, dtype=np.int64)]),
        )


@dataclass(frozen=True)
class PassParams:
    """Parameters of a pass.

    Attributes
    ----------
    scale, softcap : float
        Of the logits; softcap 0 means none.
    inv_freq : array_like, shape [n_rot / 2]
        Angle per position, radians; empty without RoPE.
    rope_neox : bool
        Pairing of dimensions, see `lookahead.rotate`.
    n_past : int
        Tokens so far, which is the position of the next token.
    n_horizon : int
        Positions that the look-ahead spreads over.
    seed : int
        Of the look-ahead, 0 <= seed < 2**64.
    budget : int
        Rows for the candidates of this head, without the sinks.
    merge : bool
        Losers are merged into winners of their chunk; otherwise they are dropped.
    n_ahead : int
        Positions that every query looks ahead at least: the window's, since a row is asked once it has left the window.
    n_full : int
        Tokens that vote in a pass that is as far from the last as it can be: a core's score is a mean over no fewer.
    distinct : int
        Percent of the budget for the keys least like the others, see `values`.
    """

    scale: float
    softcap: float
    inv_freq: np.ndarray
    rope_neox: bool
    n_past: int
    n_horizon: int
    seed: int
    budget: int
    merge: bool = True
    n_ahead: int = 0
    n_full: int = 0
    distinct: int = DISTINCT

    def __post_init__(self):
        check_budget(self.budget)


@dataclass(frozen=True)
class Scores:
    """What the look-ahead queries say about each candidate; all float64, shape [n_cand].

    A core is judged by the queries of this pass alone, a new row by all that voted while it was in the stage. The fewer
    ask, the greater is the power mean if one of them looked, and a core's best score stays: in a pass of few, the
    others count as 0.

    Attributes
    ----------
    s_use : power mean of order 4 of its probability over the queries
    s_dev : distance of its value from the mean value of the candidates, in units of the mean distance
    w : mean probability over the queries
    """

    s_use: np.ndarray
    s_dev: np.ndarray
    w: np.ndarray


@dataclass(frozen=True)
class PassResult:
    """The cores after a pass and where every candidate went.

    Attributes
    ----------
    rows : HeadRows
        The new cores, ordered by `winner`.
    winner : ndarray of int64, shape [n_out]
        Candidate whose place each core takes, increasing.
    member_of : ndarray of int64, shape [n_cand]
        Row of `rows` that each candidate is now part of, -1 if it was dropped.
    """

    rows: HeadRows
    winner: np.ndarray
    member_of: np.ndarray

    @property
    def n_dropped(self) -> int:
        return int(np.sum(self.member_of < 0))

    @property
    def n_merged(self) -> int:
        """Candidates merged into the row of another."""
        return len(self.member_of) - self.n_dropped - len(self.winner)


def compress_head(inp: PassInput, params: PassParams) -> PassResult:
    """Run one pass.

    Returns
    -------
    PassResult
        At most `budget` rows. With no more candidates than the budget, every one of them stays as it is but for its
        score.
    """
    rows = inp.candidates()
    if len(rows) == 0:
        return unchanged(rows)
    q = look_ahead(inp, params)
    scores = score(inp, params, q)
    rows = update_scores(rows, scores, inp.n_core)
    if len(rows) <= params.budget:
        return unchanged(rows)

    winner = choose_winners(values(rows, scores, params), params.budget)
    member_of = np.full(len(rows), -1, dtype=np.int64)
    member_of[winner] = np.arange(len(winner))
    if not params.merge:
        return PassResult(rows.take(winner), winner, member_of)
    q = fitted_queries(q)
    member_of = cluster(rows.k, rows.chunk, winner, query_metric(q))
    out = merge_rows(rows, winner, member_of, scores.w)
    out = replace(out, bias=fit_bias(inp, params, q, out, member_of))
    out = replace(out, v=fit_values(inp, params, q, out, member_of))
    return PassResult(out, winner, member_of)


def look_ahead(inp: PassInput, params: PassParams) -> np.ndarray:
    """Step 1. Rotate every query from its own position to n_past + n_ahead + u(pos); float64, shape [n_q, gqa, d_k]."""
    u = horizon_positions(inp.pos_q, params.n_horizon, params.seed)
    return rotate(inp.q, params.n_past + params.n_ahead + u - inp.pos_q, params.inv_freq, params.rope_neox)


def probabilities(inp: PassInput, params: PassParams, q) -> np.ndarray:
    """Step 2. Attention of every look-ahead query and query head over all rows; float64, shape [n_q * gqa, T]."""
    x = logits(q.reshape(-1, q.shape[-1]), inp.k, params.scale, params.softcap) + inp.bias
    return np.exp(x - logsumexp(x)[:, None])


def take_votes(inp: PassInput, params: PassParams, q) -> Votes:
    """Step 3, stage. The votes on new rows and window with those of this pass."""
    p = probabilities(inp, params, q)[:, inp.n_sink + inp.n_core :]
    return Votes(inp.votes.n + len(q), inp.votes.p4 + np.sum(p**4, axis=0), inp.votes.p + np.sum(p, axis=0))


def score(inp: PassInput, params: PassParams, q) -> Scores:
    """Step 3. Gather each candidate's score parts.

    Without row i the output of a query changes by P_i (v_i - output) / (1 - P_i). s_use * s_dev is the size of that
    over the queries, with the mean value in the output's place and in a unit that compares between heads. Order 4 lies
    between the root mean square, which is best for the text that follows, and the maximum, which is best for facts that
    one query in a thousand asks for.

    Parameters
    ----------
    q : ndarray, shape [n_q, gqa, d_k]
        See `look_ahead`.
    """
    p = probabilities(inp, params, q)[:, inp.cand][:, : inp.n_core]
    votes = take_votes(inp, params, q).take(slice(inp.n_new))
    n_votes = q.shape[1] * votes.n  # a vote per query head
    n_mean = q.shape[1] * max(len(q), params.n_full)
    return Scores(
        s_use=np.concatenate([np.sum(p**4, axis=0) / n_mean, votes.p4 / n_votes]) ** 0.25,
        s_dev=value_deviations(inp.v[inp.cand]),
        w=np.concatenate([np.mean(p, axis=0), votes.p / n_votes]),
    )


def value_deviations(v) -> np.ndarray:
    """|v_i - mean v| / mean_j |v_j - mean v|, and 1 where all are equal; shapes [n, d_v] -> [n]."""
    if len(v) == 0:
        return np.zeros(0)
    distance = np.linalg.norm(v - np.mean(v, axis=0), axis=1)
    return distance / np.mean(distance) if np.any(distance > 0) else np.ones(len(v))


def update_scores(rows: HeadRows, scores: Scores, n_core: int) -> HeadRows:
    """Step 3, cores. Keep the greater of the old s_use and the new one; new rows take theirs as it is."""
    s_use = scores.s_use.copy()
    s_use[:n_core] = np.maximum(s_use[:n_core], rows.s_use[:n_core])
    return replace(rows, s_use=s_use)


def key_differences(k, others) -> np.ndarray:
    """Minus the cosine between each key and the mean of the others', taken as unit vectors (KeyDiff, Park et al. 2025,
    arXiv 2504.15364); shapes [n, d_k], [m, d_k] -> [n]. A key of zero gives 0."""

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return -unit(k) @ unit(unit(others).sum(axis=0))


def values(rows: HeadRows, scores: Scores, params: PassParams) -> np.ndarray:
    """Step 5. What the candidates win by: s_use * s_dev, and infinity for `distinct` percent of the budget, the keys
    least like the mean key.

    What nobody has asked for yet has no s_use. A key unlike the others is what a question can tell apart, and it cannot
    be merged for nothing.
    """
    value = rows.s_use * scores.s_dev
    value[choose_winners(key_differences(rows.k, rows.k), params.budget * params.distinct // 100)] = np.inf
    return value


def unchanged(rows: HeadRows) -> PassResult:
    """Step 4. Every candidate stays."""
    index = np.arange(len(rows))
    return PassResult(rows, index, index.copy())


def choose_winners(value, budget: int) -> np.ndarray:
    """Step 5, first half. Indices of the `budget` greatest values, increasing; of equal values the lower index wins."""
    order = np.argsort(-np.asarray(value), kind="stable")
    return np.sort(order[:budget])


def fitted_queries(q) -> np.ndarray:
    """Queries that rows are merged by, a line per query head: those of the tokens 0, s, 2 s, ... with s = n_q gqa /
    N_FIT, rounded up; shapes [n_q, gqa, d_k] -> [n, d_k]."""
    n_q, gqa, d_k = q.shape
    return q[:: max(1, -(-n_q * gqa // N_FIT))].reshape(-1, d_k)


def query_metric(q) -> np.ndarray:
    """M = mean over queries of q q': (a - b)' M (a - b) is the mean squared difference of the raw logits of keys a and
    b.

    Parameters
    ----------
    q : ndarray, shape [n, d_k]

    Returns
    -------
    ndarray of float64, shape [d_k, d_k]
    """
    return q.T @ q / len(q)


def cluster(k, chunk, winner, metric) -> np.ndarray:
    """Step 5, second half. Every loser joins the nearest winner of its own chunk.

    Parameters
    ----------
    k : ndarray, shape [n_cand, d_k]
    chunk : ndarray of int, shape [n_cand]
    winner : ndarray of int, shape [n_out]
        Increasing.
    metric : ndarray, shape [d_k, d_k]
        See `query_metric`.

    Returns
    -------
    ndarray of int64, shape [n_cand]
        Number of the winner in `winner` that each candidate joins (ties: the lower), -1 if its chunk has none. A winner
        joins itself.
    """
    member_of = np.full(len(k), -1, dtype=np.int64)
    member_of[winner] = np.arange(len(winner))
    for i in np.flatnonzero(member_of < 0):
        near = np.flatnonzero(chunk[winner] == chunk[i])
        if len(near):
            d = k[i] - k[winner[near]]
            member_of[i] = near[np.argmin(np.sum(d @ metric * d, axis=1))]
    return member_of


def merge_rows(rows: HeadRows, winner, member_of, w) -> HeadRows:
    """Step 6, rows. Winners with losers become the mean of their members, weighted by w + 1e-9; n_tok adds up.

    Winners without losers stay as they are. The biases are still those of the winners, see `fit_bias`.
    """
    out = rows.take(winner)
    k, v, n_tok = out.k.copy(), out.v.copy(), out.n_tok.copy()
    for j in range(len(winner)):
        members = np.flatnonzero(member_of == j)
        if len(members) > 1:
            weight = w[members] + WEIGHT_FLOOR
            k[j] = weight @ rows.k[members] / np.sum(weight)
            v[j] = weight @ rows.v[members] / np.sum(weight)
            n_tok[j] = np.sum(rows.n_tok[members])
    return replace(out, k=k, v=v, n_tok=n_tok)


def fit_bias(inp: PassInput, params: PassParams, q, out: HeadRows, member_of) -> np.ndarray:
    """Step 6, bias. The merged row receives, on the average of the logs, the mass that its members received.

    bias = mean over queries of [ log(sum of the members' P) - (y - z) ], where y is the logit of the merged key and z
    the logsumexp over all rows before the pass; clamped to [-6, 8].

    Parameters
    ----------
    q : ndarray, shape [n, d_k]
        See `fitted_queries`.
    out : HeadRows
        Merged rows. The bias of those with one member stays.
    member_of : ndarray of int, shape [n_cand]

    Returns
    -------
    ndarray of float64, shape [n_out]
    """
    x = logits(q, inp.k, params.scale, params.softcap) + inp.bias
    z = logsumexp(x)
    p = np.exp(x - z[:, None])[:, inp.cand]
    y = logits(q, out.k, params.scale, params.softcap)
    bias = out.bias.copy()
    for j in range(len(out)):
        members = np.flatnonzero(member_of == j)
        if len(members) > 1:
            mass = np.maximum(np.sum(p[:, members], axis=1), MASS_FLOOR)
            bias[j] = np.clip(np.mean(np.log(mass) - (y[:, j] - z)), BIAS_MIN, BIAS_MAX)
    return bias


def fit_values(inp: PassInput, params: PassParams, q, out: HeadRows, member_of) -> np.ndarray:
    """Step 6, values. Move the merged values so that the outputs of the queries come out as before the pass.

    What a cluster's mean cannot say, and what dropped rows took with them, the merged rows make good together: least
    squares over the queries to which the pass leaves something, min |r - A d|^2 + ridge |d|^2 with the residual r of
    the outputs, the shares A of the merged rows in the new softmax, and the moves d. The ridge is that of equally
    likely moves and residuals, mean |r|^2 over the members' mean squared distance from their cluster's value, times
    `RIDGE`: the queries of the text to come are others.

    The shares no longer sum up to what they were. What that does to a query's output is counted by the mean output of
    all of them, for which nobody has to compute each query's own.

    Parameters
    ----------
    q : ndarray, shape [n, d_k]
        As in `fit_bias`.
    out : HeadRows
        Merged rows with their biases.

    Returns
    -------
    ndarray of float64, shape [n_out, d_v]
    """
    size = np.bincount(member_of[member_of >= 0], minlength=len(out))
    merged = size > 1
    inside = np.flatnonzero(member_of >= 0)
    members = inside[merged[member_of[inside]]]
    scatter = (
        np.mean(np.sum((inp.v[inp.cand][members] - out.v[member_of[members]]) ** 2, axis=1)) if len(members) else 0.0
    )
    if scatter == 0:
        return out.v
    x = logits(q, inp.k, params.scale, params.softcap) + inp.bias
    z = logsumexp(x)[:, None]
    k, v, bias = rows_after(inp, PassResult(out, np.zeros(0), member_of))
    p = np.exp(logits(q, k, params.scale, params.softcap) + bias - z)
    kept = np.sum(p, axis=1, keepdims=True)
    inv = 1 / np.maximum(kept, LEAST_KEPT)  # it may be 0
    p *= inv
    exact = np.exp(x - z) @ inp.v
    r = (exact - p @ v - (1 - inv) * (exact - np.mean(exact, axis=0))) * (kept >= LEAST_KEPT)
    a = p[:, inp.n_sink : inp.n_sink + len(out)][:, merged] * (kept >= LEAST_KEPT)
    ridge = RIDGE * np.mean(np.sum(r**2, axis=1)) / scatter
    if ridge == 0:
        return out.v
    moved = out.v.copy()
    moved[merged] += np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ r)
    return moved


def rows_after(inp: PassInput, result: PassResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step 7. What the head holds after the pass, sinks | cores | window: k [T', d_k], v [T', d_v], bias [T']."""
    end = inp.n_sink + inp.n_cand

    def join(before, cores):
        return np.concatenate([before[: inp.n_sink], cores, before[end:]])

    return join(inp.k, result.rows.k), join(inp.v, result.rows.v), join(inp.bias, result.rows.bias)


def check_budget(budget: int) -> None:
    """Raise ValueError unless budget >= 0."""
    if budget < 0:
        raise ValueError(
            f"expected a budget >= 0 rows, got {budget}; subtract the sinks only from a budget that includes them"
        )


def _expect(what: str, expected: int, got: int) -> None:
    if expected != got:
        raise ValueError(f"expected {expected} {what}, got {got}; all arrays must describe the same rows")

"""Calibration: how far the output of a kv head is off when the head holds a part of its rows.

A text is read without compression. Then every head is compressed as it would have been while the text was read, in
passes, at several budgets, and the queries of the text's last tokens are asked what they see: with all rows, and with
those that are left. Between heads this error differs by orders of magnitude, between texts by little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .attention import attend
from .compress import VOTE_EVERY, HeadRows, PassInput, PassParams, Votes, compress_head, look_ahead, take_votes

N_PASS, N_WINDOW = 252, 256
"""Tokens from one pass to the next, and those that a pass leaves in the stage."""

N_SKIP = 8
"""One probe in so many is used."""


@dataclass(frozen=True)
class TextInput:
    """A text as one kv head sees it, exact. Float arrays are taken as float64.

    Attributes
    ----------
    k : ndarray, shape [n, d_k]
        RoPE'd keys of all tokens.
    v : ndarray, shape [n, d_v]
    q : ndarray, shape [n, gqa, d_k]
        RoPE'd queries.
    pos : ndarray of int64, shape [n]
    chunk : ndarray of int32, shape [n_past - n_sink]
        Of the tokens that passes compress: all but the first `n_sink` and the last `n_exact`.
    n_sink, n_exact : int
    n_probe : int
        Of the exact tokens, the last: their queries tell the error.
    """

    k: np.ndarray
    v: np.ndarray
    q: np.ndarray
    pos: np.ndarray
    chunk: np.ndarray
    n_sink: int
    n_exact: int
    n_probe: int

    @property
    def n_past(self) -> int:
        return len(self.k) - self.n_exact


def output_errors(
    text: TextInput, params: PassParams, parts, n_pass: int = N_PASS, n_window: int = N_WINDOW, n_skip: int = N_SKIP
) -> np.ndarray:
    """Mean over the probes' queries of |output - exact output|^2.

    Parameters
    ----------
    params : PassParams
        `n_past`, `n_ahead` and `budget` are those of each pass, whatever they are here.
    parts : sequence of float, length n_part
        The head holds round(part * n_past) rows, sinks included, at least one more than the sinks.
    n_pass, n_window, n_skip : int
        Tokens, see above. Passes read the text up to `n_window` tokens behind `n_past`, at most `n_exact`.

    Returns
    -------
    ndarray of float64, shape [n_part]
    """
    n = len(text.k)
    probes = np.arange(n - text.n_probe, n, n_skip)
    causal = np.where(np.arange(n) <= probes[:, None], 0.0, -np.inf)
    exact = attend(text.q[probes], text.k, text.v, np.zeros(n), params.scale, params.softcap, mask=causal)
    errors = []
    for part in parts:
        n_rows = max(text.n_sink + 1, int(np.floor(part * text.n_past + 0.5)))
        cores = read_in_passes(text, replace(params, budget=n_rows - text.n_sink), n_pass, n_window)
        sinks, tail = slice(0, text.n_sink), slice(text.n_past, n)
        k, v = (np.concatenate([x[sinks], y, x[tail]]) for x, y in ((text.k, cores.k), (text.v, cores.v)))
        bias = np.concatenate([np.zeros(text.n_sink), cores.bias, np.zeros(text.n_exact)])
        mask = np.concatenate([np.zeros((len(probes), text.n_sink + len(cores))), causal[:, tail]], axis=1)
        out = attend(text.q[probes], k, v, bias, params.scale, params.softcap, mask=mask)
        errors.append(np.mean(np.sum((out - exact) ** 2, axis=-1)))
    return np.array(errors)


def read_in_passes(text: TextInput, params: PassParams, n_pass: int, n_window: int) -> HeadRows:
    """The cores that a pass after every `n_pass` tokens makes of the text up to its exact tokens.

    A pass leaves the newest `n_window` tokens in the stage; the first that takes any also takes the sinks. Those before
    it only take votes.
    """
    none, zero = np.zeros(0), np.zeros(len(text.k))
    cores = HeadRows(text.k[:0], text.v[:0], none, none, none, none)
    n_read = text.n_past + n_window
    votes = Votes.none(n_read)  # by token
    done = 0
    for begin in range(0, n_read, n_pass):
        end = min(begin + n_pass, n_read)
        first = done or text.n_sink
        stop = end - n_window if end - n_window > first else done
        new, sinks, window = slice(first, max(first, stop)), slice(0, text.n_sink if stop else 0), slice(stop, end)
        stage, voters = np.r_[new, window], slice(begin, end, VOTE_EVERY)
        inp = PassInput(
            k=np.concatenate([text.k[sinks], cores.k, text.k[new], text.k[window]]),
            v=np.concatenate([text.v[sinks], cores.v, text.v[new], text.v[window]]),
            bias=np.concatenate([zero[sinks], cores.bias, zero[new], zero[window]]),
            n_sink=len(text.k[sinks]),
            n_win=end - stop,
            chunk=np.concatenate([cores.chunk, text.chunk[new.start - text.n_sink : new.stop - text.n_sink]]),
            s_use=cores.s_use,
            n_tok=cores.n_tok,
            q=text.q[voters],
            pos_q=text.pos[voters],
            votes=votes.take(stage),
        )
        now = replace(params, n_past=int(text.pos[end - 1]) + 1, n_ahead=n_window)
        taken = take_votes(inp, now, look_ahead(inp, now))
        for name in ("n", "p4", "p"):
            getattr(votes, name)[stage] = getattr(taken, name)
        cores, done = compress_head(inp, now).rows, stop
    return cores

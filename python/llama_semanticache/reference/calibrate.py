"""Calibration: how far the output of a kv head is off when the head holds a part of its rows.

A text is read without compression. Then every head is compressed as it would have been while the text was read, in passes,
at several budgets, and the queries of the text's last tokens are asked what they see: with all rows, and with those that are
left. Between heads this error differs by orders of magnitude, between texts by little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .attention import attend
from .compress import HeadRows, PassInput, PassParams, compress_head

N_PASS, N_WINDOW = 252, 256
"""Tokens that one pass takes, and those behind them whose queries look on: what a stage of 512 does."""

N_SKIP = 8
"""Every so many'th of the probes is used."""


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
        Of the exact tokens, the last: their queries tell the error. Where `n_exact - n_probe` is smaller than a pass's window,
        the window reaches into the probes.
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


def output_errors(text: TextInput, params: PassParams, parts, n_pass: int = N_PASS, n_window: int = N_WINDOW, n_skip: int = N_SKIP) -> np.ndarray:
    """Mean over the probes' queries of |output - exact output|^2.

    Parameters
    ----------
    params : PassParams
        `n_past` and `budget` are those of each pass, whatever they are here.
    parts : sequence of float, length n_part
        The head holds round(part * n_past) rows, sinks included, at least one more than the sinks.
    n_pass, n_window, n_skip : int
        Tokens, see above. `n_window` must not be larger than `n_exact`.

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
    """The cores that passes of `n_pass` tokens make of the text up to its exact tokens; the first takes the sinks as well."""
    none = np.zeros(0)
    cores = HeadRows(text.k[:0], text.v[:0], none, none, none, none)
    for begin in range(text.n_sink, text.n_past, n_pass):
        end = min(begin + n_pass, text.n_past)
        new, sinks, window = slice(begin, end), slice(0, text.n_sink), slice(end, end + n_window)

        def rows(x, of_cores):
            return np.concatenate([x[sinks], of_cores, x[new], x[window]])

        inp = PassInput(
            k=rows(text.k, cores.k), v=rows(text.v, cores.v), bias=rows(np.zeros(len(text.k)), cores.bias), n_sink=text.n_sink,
            n_win=n_window, chunk=np.concatenate([cores.chunk, text.chunk[begin - text.n_sink:end - text.n_sink]]),
            s_use=cores.s_use, n_tok=cores.n_tok, q=text.q[begin:end + n_window], pos_q=text.pos[begin:end + n_window],
        )
        cores = compress_head(inp, replace(params, n_past=int(text.pos[end + n_window - 1]) + 1)).rows
    return cores

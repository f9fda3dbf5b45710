"""Baselines: what the eviction methods of others keep. Nothing is merged; every policy scores rows, and the best
candidates stay.

KeyDiff  Park et al. 2025, arXiv 2504.15364   the keys least like the mean of all unit keys
Knorm    Devoto et al. 2024, arXiv 2406.11430 the shortest keys
SnapKV   Li et al. 2024, arXiv 2404.14469     the mean attention of the newest tokens' queries, smoothed along the text
TOVA     Oren et al. 2024, arXiv 2401.06104   the attention of the newest query
H2O      Zhang et al. 2023, arXiv 2306.14048  the attention of all queries so far, summed up;
                                              half of what is kept are the newest

Queries ask from where they are, of the tokens up to their own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .attention import logits
from .compress import PassInput, PassParams, PassResult, check_budget, choose_winners, key_differences, unchanged

N_OBSERVE, N_POOL = 64, 5
"""SnapKV: tokens whose queries count, and rows of the moving average."""


def shares(inp: PassInput, params: PassParams, query) -> np.ndarray:
    """Attention shares of the queries of some tokens on all rows, shape [len(query), gqa, T]."""
    n_stage = inp.n_new + inp.n_win
    pos = np.concatenate([np.full(len(inp.k) - n_stage, -1), np.arange(params.n_past - n_stage, params.n_past)])
    x = logits(inp.q[query], inp.k, params.scale, params.softcap)
    x = np.where(pos <= inp.pos_q[query][:, None, None], x, -np.inf)
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def keydiff(inp: PassInput, params: PassParams) -> np.ndarray:
    return key_differences(inp.k, inp.k[inp.cand])


def knorm(inp: PassInput, params: PassParams) -> np.ndarray:
    return -np.linalg.norm(inp.k, axis=1)


def snapkv(inp: PassInput, params: PassParams) -> np.ndarray:
    score = shares(inp, params, np.flatnonzero(inp.pos_q > inp.pos_q[-1] - N_OBSERVE)).sum(axis=(0, 1))
    score[inp.cand] = np.convolve(score[inp.cand], np.full(N_POOL, 1 / N_POOL))[N_POOL // 2 :][: inp.n_cand]
    return score


def tova(inp: PassInput, params: PassParams) -> np.ndarray:
    return shares(inp, params, [-1]).sum(axis=(0, 1))


def h2o(inp: PassInput, params: PassParams) -> np.ndarray:
    before = np.concatenate([np.zeros(inp.n_sink), inp.s_use, np.where(inp.votes.n > 0, inp.votes.p, 0.0)])
    return before + shares(inp, params, np.arange(len(inp.q))).sum(axis=(0, 1))


POLICIES = {"keydiff": keydiff, "knorm": knorm, "snapkv": snapkv, "tova": tova, "h2o": h2o}


def compress_head_evict(inp: PassInput, params: PassParams, policy: str) -> PassResult:
    """Keep the `budget` candidates that the policy scores highest; the score is left in s_use."""
    check_budget(params.budget)
    score = POLICIES[policy](inp, params)[inp.cand] if inp.n_cand else np.zeros(0)
    rows = replace(inp.candidates(), s_use=score)
    if len(rows) <= params.budget:
        return unchanged(rows)
    if policy == "h2o" and params.budget > inp.n_win:  # the window belongs to the newest
        score = np.where(np.arange(len(rows)) >= len(rows) - (params.budget - inp.n_win) // 2, np.inf, score)
    winner = choose_winners(score, params.budget)
    member_of = np.full(len(rows), -1, dtype=np.int64)
    member_of[winner] = np.arange(len(winner))
    return PassResult(rows.take(winner), winner, member_of)

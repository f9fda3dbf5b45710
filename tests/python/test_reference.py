"""The numpy reference: properties that make it the specification, and the golden files made from it."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "llama_semanticache"
GOLDEN = ROOT / "tests" / "golden"

# The reference stands alone: imported through the package it would need the native library. The folder is appended
# because its profile.py must not hide the standard one.
if str(PACKAGE) not in sys.path:
    sys.path.append(str(PACKAGE))

import reference as ref  # noqa: E402

SEEDS = range(6)


# --------------------------------------------------------------------------------------------------------------- inputs


def random_input(seed, n_sink=4, n_core=10, n_new=40, n_win=8, d_k=16, d_v=12, gqa=2, n_past=400):
    """One kv head with random rows: about 6 chunks, cores with scores and biases of their own."""
    rng = np.random.default_rng(seed)
    n_rows, n_q = n_sink + n_core + n_new + n_win, n_new + n_win
    core_chunk = np.sort(rng.integers(0, 3, n_core))
    chunk = np.concatenate([core_chunk, ref.chunk_ids(rng.random(n_new) < 0.1, 12, 3)])
    n_tok = rng.integers(1, 9, n_core)
    bias = np.zeros(n_rows)
    bias[n_sink : n_sink + n_core] = np.log(n_tok) + 0.1 * rng.standard_normal(n_core)
    return ref.PassInput(
        k=rng.standard_normal((n_rows, d_k)),
        v=rng.standard_normal((n_rows, d_v)),
        bias=bias,
        n_sink=n_sink,
        n_win=n_win,
        chunk=chunk,
        s_use=0.5 * rng.random(n_core),
        n_tok=n_tok,
        q=rng.standard_normal((n_q, gqa, d_k)),
        pos_q=np.arange(n_past - n_q, n_past),
    )


def params_for(inp, budget, n_past=400, softcap=0.0, merge=True, neox=True, n_rot=None, seed=1, n_horizon=512, **more):
    d_k = inp.k.shape[1]
    n_rot = d_k if n_rot is None else n_rot
    inv_freq = 10000.0 ** (-2 * np.arange(n_rot // 2) / max(1, n_rot))
    return ref.PassParams(
        scale=d_k**-0.5,
        softcap=softcap,
        inv_freq=inv_freq,
        rope_neox=neox,
        n_past=n_past,
        n_horizon=n_horizon,
        seed=seed,
        budget=budget,
        merge=merge,
        **more,
    )


def assert_same_rows(a, b):
    for name in ("k", "v", "bias", "chunk", "s_use", "n_tok"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def attend_after(inp, result, q, scale, softcap=0.0):
    return ref.attend(q, *ref.rows_after(inp, result), scale, softcap)


def test_needs_numpy_alone():
    code = (
        f"import sys; sys.path.append({str(PACKAGE)!r}); import reference; "
        "print(sorted({'llama_cpp', 'llama_semanticache', 'cffi', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    "text",
    [
        ".",
        "!",
        "?",
        ";",
        ":",
        ",",
        "\n",
        "{",
        "}",
        "。",
        "！",
        "？",
        "；",
        "：",
        "，",
        "、",
        "…",
        "．",
        " end.",
        ",   ",
        "\n  ",
        "\r\n",
        "字。 ",
        "...",
        "){",
    ],
)
def test_delimiters(text):
    assert ref.delimiter_table([text.encode()], [False]).tolist() == [True]


@pytest.mark.parametrize(
    "piece",
    [b"", b"   ", b"word", b".word", b")", b"\t", b"\r", b".\t", "。字".encode(), "　".encode(), b"\x82", b"\x80\x82"],
)
def test_not_delimiters(piece):
    assert ref.delimiter_table([piece], [False]).tolist() == [False]


def test_control_tokens_are_delimiters():
    assert ref.delimiter_table([b"<|im_end|>", b"", b"a", b"."], [True, True, False, False]).tolist() == [
        True,
        True,
        False,
        True,
    ]


def test_delimiter_table_wants_a_flag_per_token():
    with pytest.raises(ValueError, match="expected one control flag per token"):
        ref.delimiter_table([b"a", b"b"], [False])


def test_chunks_end_after_delimiters():
    assert ref.chunk_ids([0, 1, 0, 0, 1, 1, 0], 32, 5).tolist() == [5, 5, 6, 6, 6, 7, 8]


def test_chunks_of_a_chinese_sentence():
    text = "秋天来了，天气凉了。一片片黄叶"
    table = dict(zip(text, ref.delimiter_table([c.encode() for c in text], [False] * len(text)), strict=True))
    assert ref.chunk_ids([table[c] for c in text], 32, 0).tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_chunks_are_capped():
    ids = ref.chunk_ids([False] * 70, 32, 0)
    assert np.bincount(ids).tolist() == [32, 32, 6]


def test_delimiter_at_the_cap_ends_one_chunk_only():
    assert ref.chunk_ids([0, 0, 0, 1, 0], 4, 0).tolist() == [0, 0, 0, 0, 1]


def test_no_tokens_no_chunks():
    assert len(ref.chunk_ids([], 32, 9)) == 0


# ------------------------------------------------------------------------------------------------------------ lookahead


def test_splitmix64_is_the_published_one():
    gamma = 0x9E3779B97F4A7C15
    assert ref.splitmix64(0) == 0xE220A8397B1DCDAF
    assert [ref.splitmix64(1234567), ref.splitmix64(1234567 + gamma)] == [6457827717110365317, 3203168211198807973]


def test_horizon_positions_wrap_around():
    assert ref.horizon_positions([1], 10**6, 2**64 - 1).tolist() == [ref.splitmix64(0) % 10**6]


def test_horizon_positions_cover_the_horizon():
    u = ref.horizon_positions(np.arange(4000), 50, 3)
    assert set(u.tolist()) == set(range(50))
    assert abs(np.mean(u) - 24.5) < 1.0
    assert ref.horizon_positions([1, 2], 1, 3).tolist() == [0, 0]


ROPE = [(16, 16, True), (16, 16, False), (20, 8, True), (20, 8, False), (16, 0, True)]


def angles(n_rot):
    return 10000.0 ** (-2 * np.arange(n_rot // 2) / max(1, n_rot))


@pytest.mark.parametrize("d, n_rot, neox", ROPE)
def test_rotation_is_additive(d, n_rot, neox):
    rng = np.random.default_rng(0)
    q, a, b = rng.standard_normal((7, 3, d)), rng.integers(0, 5000, 7), rng.integers(-5000, 5000, 7)
    twice = ref.rotate(ref.rotate(q, a, angles(n_rot), neox), b, angles(n_rot), neox)
    np.testing.assert_allclose(twice, ref.rotate(q, a + b, angles(n_rot), neox), atol=1e-10)


@pytest.mark.parametrize("d, n_rot, neox", ROPE)
def test_dot_products_depend_on_relative_positions_only(d, n_rot, neox):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 50, d))
    at, behind, shift = rng.integers(0, 3000, 50), rng.integers(0, 3000, 50), rng.integers(0, 3000, 50)

    def dots(offset):
        rotated_q, rotated_k = (ref.rotate(x, pos + offset, angles(n_rot), neox) for x, pos in ((q, at), (k, behind)))
        return np.sum(rotated_q * rotated_k, axis=1)

    np.testing.assert_allclose(dots(shift), dots(0), atol=1e-10)


@pytest.mark.parametrize("neox, pair", [(True, (0, 3)), (False, (0, 1))])
def test_rotation_pairs_by_hand(neox, pair):
    q = np.zeros((1, 8))
    q[0, pair[0]], q[0, 6:] = 1, (5, 6)
    expected = np.zeros((1, 8))
    expected[0, pair[1]], expected[0, 6:] = 1, (5, 6)
    np.testing.assert_allclose(ref.rotate(q, [1], [math.pi / 2, 0.0, 0.0], neox), expected, atol=1e-15)


def test_rotation_without_rope_changes_nothing():
    q = np.random.default_rng(0).standard_normal((3, 2, 8))
    np.testing.assert_array_equal(ref.rotate(q, [1, 2, 3], [], True), q)


def test_rotation_wants_an_angle_per_pair():
    with pytest.raises(ValueError, match="expected at most 4 angles"):
        ref.rotate(np.zeros((1, 8)), [1], np.ones(5), True)


# ------------------------------------------------------------------------------------------------------------ attention


def plain_attention(q, k, v, scale):
    out = np.zeros((*q.shape[:2], v.shape[1]))
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            e = [math.exp(scale * float(q[i, h] @ row)) for row in k]
            out[i, h] = sum(p * row for p, row in zip(e, v, strict=True)) / sum(e)
    return out


def attention_rows(seed, n=9, d=8):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((5, 3, d)), rng.standard_normal((n, d)), rng.standard_normal((n, d))


def test_attention_without_bias_is_softmax_attention():
    q, k, v = attention_rows(0)
    np.testing.assert_allclose(ref.attend(q, k, v, np.zeros(9), 0.3), plain_attention(q, k, v, 0.3), atol=1e-12)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_bias_log_n_is_n_copies(softcap):
    q, k, v = attention_rows(1)
    n = np.array([1, 2, 7, 1, 3, 1, 1, 40, 1])
    copies = ref.attend(q, np.repeat(k, n, axis=0), np.repeat(v, n, axis=0), np.zeros(n.sum()), 0.3, softcap)
    np.testing.assert_allclose(ref.attend(q, k, v, np.log(n), 0.3, softcap), copies, atol=1e-12)


def test_softcap_bounds_the_logits_before_the_bias():
    y = ref.logits(np.array([100.0, 0.0]), np.array([[1.0, 0.0], [0.01, 0.0], [-1.0, 0.0]]), 1.0, 5.0)
    np.testing.assert_allclose(y, [5.0, 5 * math.tanh(0.2), -5.0], atol=1e-12)


def test_sink_logit_is_a_row_without_value():
    q, k, v = attention_rows(2)
    sinks = np.array([0.5, -1.0, 3.0])
    out = ref.attend(q, k, v, np.zeros(9), 0.3, sinks=sinks)
    for h in range(3):
        rows = ref.attend(
            q[:, h : h + 1], np.vstack([k, np.zeros(8)]), np.vstack([v, np.zeros(8)]), [*np.zeros(9), sinks[h]], 0.3
        )
        np.testing.assert_allclose(out[:, h], rows[:, 0], atol=1e-12)


def test_hidden_rows_do_not_count():
    q, k, v = attention_rows(3)
    seen = np.arange(9) < 6
    bias, visible = np.where(seen, 0.0, -np.inf), ref.attend(q, k[:6], v[:6], np.zeros(6), 0.3)
    np.testing.assert_allclose(ref.attend(q, k, v, bias, 0.3), visible, atol=1e-12)
    np.testing.assert_allclose(ref.attend(q, k, v, np.zeros(9), 0.3, mask=np.tile(bias, (5, 1))), visible, atol=1e-12)


def test_huge_logits_do_not_overflow():
    q, k, v = attention_rows(4)
    out = ref.attend(1e6 * q, k, v, np.zeros(9), 1.0)
    np.testing.assert_allclose(out, v[np.argmax(q @ k.T, axis=-1)])


# ------------------------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("softcap, n_rot, neox", [(0.0, None, True), (5.0, 8, False), (0.0, 0, True)])
def test_score_by_definition(seed, softcap, n_rot, neox):
    inp = random_input(seed)
    params = params_for(inp, 20, softcap=softcap, n_rot=n_rot, neox=neox)
    u = ref.horizon_positions(inp.pos_q, params.n_horizon, params.seed)
    p = []
    for i in range(len(inp.q)):
        q = ref.rotate(inp.q[i : i + 1], [params.n_past + u[i] - inp.pos_q[i]], params.inv_freq, neox)[0]
        for h in range(inp.q.shape[1]):
            y = [params.scale * float(q[h] @ k) for k in inp.k]
            y = [softcap * math.tanh(t / softcap) for t in y] if softcap else y
            e = [math.exp(t + b) for t, b in zip(y, inp.bias, strict=True)]
            p.append([t / sum(e) for t in e][4:-8])
    p = np.array(p)
    got = ref.score(inp, params, ref.look_ahead(inp, params))
    np.testing.assert_allclose(got.s_use, (p**4).mean(axis=0) ** 0.25, rtol=1e-10)
    np.testing.assert_allclose(got.w, p.mean(axis=0), rtol=1e-10)
    far = [math.dist(v, inp.v[4:-8].mean(axis=0)) for v in inp.v[4:-8]]
    np.testing.assert_allclose(got.s_dev, np.array(far) / (sum(far) / len(far)), rtol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_votes_of_two_passes_are_those_of_one(seed):
    """Queries that vote one after the other say of the stage what they say together, as long as the rows are the
    same.
    """
    inp = random_input(seed)
    params = params_for(inp, 20)
    q = ref.look_ahead(inp, params)
    none = ref.Votes.none(inp.n_new + inp.n_win)
    first = ref.take_votes(replace(inp, votes=none), params, q[:30])
    second = replace(inp, votes=first)
    both, whole = ref.take_votes(second, params, q[30:]), ref.take_votes(inp, params, q)
    assert both.n.tolist() == whole.n.tolist() == [len(q)] * len(none)
    np.testing.assert_allclose(both.p4, whole.p4, rtol=1e-12)
    np.testing.assert_allclose(both.p, whole.p, rtol=1e-12)
    got, want, late = ref.score(second, params, q[30:]), ref.score(inp, params, q), ref.score(inp, params, q[30:])
    for name in ("s_use", "w"):
        np.testing.assert_allclose(getattr(got, name)[inp.n_core :], getattr(want, name)[inp.n_core :], rtol=1e-12)
        np.testing.assert_array_equal(
            getattr(got, name)[: inp.n_core], getattr(late, name)[: inp.n_core]
        )  # a core: these alone


def test_a_pass_without_new_rows_only_takes_votes():
    inp = random_input(1, n_new=0, n_win=20)
    result = ref.compress_head(inp, params_for(inp, 10))
    rows = inp.candidates()
    assert_same_rows(replace(result.rows, s_use=rows.s_use), rows)
    assert (ref.take_votes(inp, params_for(inp, 10), inp.q).n == 20).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_cores_keep_their_best_score(seed):
    inp = random_input(seed)
    params = params_for(inp, inp.n_cand)
    now = ref.score(inp, params, ref.look_ahead(inp, params))
    rows = ref.compress_head(inp, params).rows
    np.testing.assert_array_equal(rows.s_use[:10], np.maximum(now.s_use[:10], inp.s_use))
    assert np.any(rows.s_use[:10] > now.s_use[:10])
    np.testing.assert_array_equal(rows.s_use[10:], now.s_use[10:])


def test_equal_values_do_not_decide():
    np.testing.assert_array_equal(ref.value_deviations(np.tile([1.0, -2.0], (5, 1))), np.ones(5))


@pytest.mark.parametrize("extra", [0, 1, 1000])
@pytest.mark.parametrize("merge", [True, False])
def test_below_budget_nothing_changes(extra, merge):
    inp = random_input(0)
    result = ref.compress_head(inp, params_for(inp, inp.n_cand + extra, merge=merge))
    for got, before in zip(ref.rows_after(inp, result), (inp.k, inp.v, inp.bias), strict=True):
        np.testing.assert_array_equal(got, before)
    assert (result.n_merged, result.n_dropped) == (0, 0)
    assert result.rows.n_tok.tolist() == [*inp.n_tok, *[1] * inp.n_new]
    np.testing.assert_array_equal(result.rows.chunk, inp.chunk)


@pytest.mark.parametrize("n, m", [(2, 0), (31, 0), (12, 5), (300, 0)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_identical_tokens_merge_exactly(n, m, softcap):
    """n equal tokens, and a core that already stands for m of them, become one row with bias log(n + m)."""
    base = random_input(n, n_core=int(m > 0), n_new=n, n_win=6)
    k, v, bias = base.k.copy(), base.v.copy(), base.bias.copy()
    k[base.cand], v[base.cand] = k[4], v[4]
    bias[4] = math.log(m) if m else 0.0
    inp = replace(base, k=k, v=v, bias=bias, chunk=np.zeros(base.n_cand), n_tok=np.full(base.n_core, m))
    result = ref.compress_head(inp, params_for(inp, 1, softcap=softcap))
    assert result.rows.bias == pytest.approx([math.log(n + m)], abs=1e-6)
    assert result.rows.n_tok.tolist() == [n + m]
    np.testing.assert_allclose(result.rows.k[0], k[4], atol=1e-12)
    q = np.random.default_rng(9).standard_normal((20, 2, 16))
    np.testing.assert_allclose(
        attend_after(inp, result, q, 0.25, softcap), ref.attend(q, k, v, bias, 0.25, softcap), atol=1e-6
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("softcap, n_new", [(0.0, 40), (5.0, 40), (0.0, 210)])
def test_merged_rows_receive_the_mass_of_their_members(seed, softcap, n_new):
    inp = random_input(seed, n_new=n_new)
    params = params_for(inp, n_new // 2, softcap=softcap)
    result = ref.compress_head(inp, params)
    q = ref.fitted_queries(ref.look_ahead(inp, params))
    x = ref.logits(q, inp.k, params.scale, softcap) + inp.bias
    z = np.log(np.sum(np.exp(x), axis=1))
    p = np.exp(x - z[:, None])[:, inp.cand]
    checked = 0
    for j, row in enumerate(result.rows.k):
        members = result.member_of == j
        if members.sum() > 1 and ref.BIAS_MIN < result.rows.bias[j] < ref.BIAS_MAX:
            received = ref.logits(q, row[None], params.scale, softcap)[:, 0] + result.rows.bias[j] - z
            assert np.mean(received) == pytest.approx(np.mean(np.log(p[:, members].sum(axis=1))), abs=1e-9)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("core_bias, bound", [(7.9, ref.BIAS_MAX), (-12.0, ref.BIAS_MIN)])
def test_fitted_bias_is_clamped(core_bias, bound):
    base = random_input(0, n_core=2, n_new=4)
    bias, k = base.bias.copy(), base.k.copy()
    bias[4:6], k[5] = core_bias, k[4]
    chunk = np.array([0, 0, 1, 1, 1, 1])
    s_use = np.array([1e6, 1e5])  # both cores outrank the new rows
    inp = replace(base, k=k, bias=bias, chunk=chunk, s_use=s_use)
    result = ref.compress_head(inp, params_for(inp, 1, distinct=0))
    assert result.member_of.tolist() == [0, 0, -1, -1, -1, -1]
    assert result.rows.bias.tolist() == [bound]


@pytest.mark.parametrize("seed", SEEDS)
def test_winners_are_the_best_scores(seed):
    inp = random_input(seed)
    params = params_for(inp, 17, distinct=0)
    result = ref.compress_head(inp, params)
    all_rows = ref.compress_head(inp, replace(params, budget=inp.n_cand)).rows
    value = all_rows.s_use * ref.score(inp, params, ref.look_ahead(inp, params)).s_dev
    losers = np.setdiff1d(np.arange(inp.n_cand), result.winner)
    assert value[result.winner].min() > value[losers].max()
    np.testing.assert_array_equal(result.rows.s_use, all_rows.s_use[result.winner])
    assert np.all(np.diff(result.winner) > 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_the_winners_are_the_keys_least_like_the_others(seed):
    inp = random_input(seed)
    params = params_for(inp, 17)
    result = ref.compress_head(inp, params)
    rows = ref.compress_head(inp, replace(params, budget=inp.n_cand)).rows
    unit = rows.k / np.linalg.norm(rows.k, axis=1, keepdims=True)
    distinct = np.argsort(unit @ unit.sum(axis=0))[:8]
    value = rows.s_use * ref.score(inp, params, ref.look_ahead(inp, params)).s_dev
    others = np.setdiff1d(np.arange(inp.n_cand), distinct)
    best = others[np.argsort(-value[others])[:9]]
    assert result.winner.tolist() == sorted([*distinct, *best])
    assert set(result.winner) != set(ref.compress_head(inp, replace(params, distinct=0)).winner)


def test_equal_scores_favour_the_lower_index():
    assert ref.choose_winners([1.0, 3.0, 2.0, 2.0, 2.0], 3).tolist() == [1, 2, 3]
    assert ref.choose_winners(np.tile([1.0, 2.0], 500), 600).tolist() == sorted([*range(0, 200, 2), *range(1, 1000, 2)])
    assert ref.choose_winners([1.0, 1.0, 1.0], 0).tolist() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_losers_join_the_nearest_winner_of_their_chunk(seed):
    inp = random_input(seed)
    params = params_for(inp, 15)
    result = ref.compress_head(inp, params)
    q = ref.look_ahead(inp, params).reshape(-1, 16)
    y = q @ inp.k[inp.cand].T  # raw logits: the metric is their mean squared difference
    joined = 0
    for i in np.setdiff1d(np.arange(inp.n_cand), result.winner):
        near = [j for j, w in enumerate(result.winner) if inp.chunk[w] == inp.chunk[i]]
        if not near:
            assert result.member_of[i] == -1
            continue
        distance = [np.mean((y[:, i] - y[:, result.winner[j]]) ** 2) for j in near]
        assert result.member_of[i] == near[int(np.argmin(distance))]
        joined += 1
    assert joined == result.n_merged > 0


def test_equal_distances_favour_the_lower_winner():
    k = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    assert ref.cluster(k, np.zeros(3), np.array([0, 2]), np.eye(2)).tolist() == [0, 0, 1]


def run_method(method, inp, budget):
    if method == "paper":
        return ref.compress_head_paper(inp, budget)
    if method == "streaming":
        return ref.compress_head_streaming(inp, budget)
    return ref.compress_head(inp, params_for(inp, budget, merge=method == "semantic"))


METHODS = ("semantic", "no merge", "paper", "streaming")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0, 1, 7, 25, 49])
def test_sizes_and_members(seed, method, budget):
    inp = random_input(seed)
    result = run_method(method, inp, budget)
    n_out = len(result.rows)
    if method == "paper":
        assert n_out <= budget
    else:
        assert n_out == budget
    assert len(result.rows.k) == len(result.rows.v) == len(result.rows.n_tok) == len(result.winner) == n_out
    np.testing.assert_array_equal(result.member_of[result.winner], np.arange(n_out))
    assert n_out + result.n_merged + result.n_dropped == inp.n_cand
    if method in ("no merge", "streaming"):
        assert result.n_merged == 0
    n_tok = inp.candidates().n_tok
    for j in range(n_out):
        assert result.rows.n_tok[j] == n_tok[result.member_of == j].sum()
        assert set(inp.chunk[result.member_of == j]) == {result.rows.chunk[j]}  # clusters never cross a chunk
    dropped = inp.chunk[result.member_of == -1]
    if method in ("semantic", "paper"):  # a chunk with a row left has lost no candidate
        assert not set(dropped) & set(result.rows.chunk)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", SEEDS)
def test_sinks_and_window_are_untouched(method, seed):
    inp = random_input(seed)
    before = {name: getattr(inp, name).copy() for name in ("k", "v", "bias", "chunk", "s_use", "n_tok", "q")}
    result = run_method(method, inp, 20)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(inp, name), value, err_msg=name)
    for after, old in zip(ref.rows_after(inp, result), (before["k"], before["v"], before["bias"]), strict=True):
        np.testing.assert_array_equal(after[:4], old[:4])
        np.testing.assert_array_equal(after[-8:], old[-8:])
    v = inp.v.copy()
    v[:4] = v[-8:] = (
        np.nan
    )  # and their values reach no core, but as a part of the outputs that merged values are fitted to
    other = run_method(method, replace(inp, v=v), 20).rows
    assert_same_rows(replace(other, v=result.rows.v) if method == "semantic" else other, result.rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_without_losers_stay(seed):
    inp = random_input(seed)
    result = ref.compress_head(inp, params_for(inp, 35))
    alone = np.bincount(result.member_of[result.member_of >= 0]) == 1
    assert 0 < alone.sum() < 35
    rows = inp.candidates().take(result.winner)
    for name in ("k", "v", "bias", "n_tok"):
        np.testing.assert_array_equal(getattr(result.rows, name)[alone], getattr(rows, name)[alone])


@pytest.mark.parametrize("seed", SEEDS)
def test_merged_rows_are_weighted_means(seed):
    inp = random_input(seed)
    params = params_for(inp, 15)
    result = ref.compress_head(inp, params)
    w = ref.score(inp, params, ref.look_ahead(inp, params)).w + 1e-9
    for j in np.flatnonzero(np.bincount(result.member_of[result.member_of >= 0]) > 1):
        members = result.member_of == j
        np.testing.assert_allclose(
            result.rows.k[j], np.average(inp.k[inp.cand][members], axis=0, weights=w[members]), atol=1e-12
        )

    rows = ref.merge_rows(inp.candidates(), result.winner, result.member_of, w - 1e-9)
    for j in np.flatnonzero(np.bincount(result.member_of[result.member_of >= 0]) > 1):
        members = result.member_of == j
        np.testing.assert_allclose(
            rows.v[j], np.average(inp.v[inp.cand][members], axis=0, weights=w[members]), atol=1e-12
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_fitted_values_bring_the_outputs_back(seed):
    inp = random_input(seed)
    params = params_for(inp, 15)
    result = ref.compress_head(inp, params)
    q = ref.look_ahead(inp, params)
    want = ref.attend(q, inp.k, inp.v, inp.bias, params.scale, params.softcap)

    def missing(rows):
        k, v, bias = ref.rows_after(inp, replace(result, rows=rows))
        return want - ref.attend(q, k, v, bias, params.scale, params.softcap)

    merged = np.bincount(result.member_of[result.member_of >= 0], minlength=len(result.rows)) > 1
    weights = ref.score(inp, params, q).w
    means = replace(result.rows, v=ref.merge_rows(inp.candidates(), result.winner, result.member_of, weights).v)
    assert np.sum(missing(result.rows) ** 2) < np.sum(missing(means) ** 2)
    np.testing.assert_array_equal(result.rows.v[~merged], means.v[~merged])

    # a move along the residual's projection on the shares, as a ridge has it: A'(r - A d) = ridge d; what the sum of
    # the shares does counts by the mean output
    def all_logits(k, bias):
        return ref.logits(q.reshape(-1, q.shape[-1]), k, params.scale, params.softcap) + bias

    k, _, bias = ref.rows_after(inp, result)
    z = ref.logsumexp(all_logits(k, bias))[:, None]
    a = np.exp(all_logits(k, bias) - z)[:, inp.n_sink : inp.n_sink + len(merged)][:, merged]
    own = want.reshape(len(a), -1) - np.mean(want.reshape(len(a), -1), axis=0)
    inv = np.exp(ref.logsumexp(all_logits(inp.k, inp.bias))[:, None] - z)
    left = a.T @ (missing(result.rows).reshape(len(a), -1) - (1 - inv) * own)
    moves = (result.rows.v - means.v)[merged]
    ridge = np.sum(left * moves) / np.sum(moves * moves)
    assert ridge > 0
    np.testing.assert_allclose(left, ridge * moves, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_merging_winners_stay_as_they_are(seed):
    inp = random_input(seed)
    merged, dropped = (ref.compress_head(inp, params_for(inp, 15, merge=merge)) for merge in (True, False))
    np.testing.assert_array_equal(merged.winner, dropped.winner)
    rows = inp.candidates().take(dropped.winner)
    for name in ("k", "v", "bias", "n_tok"):
        np.testing.assert_array_equal(getattr(dropped.rows, name), getattr(rows, name))


@pytest.mark.parametrize("method", METHODS)
def test_determinism(method):
    assert_same_rows(run_method(method, random_input(3), 20).rows, run_method(method, random_input(3), 20).rows)


def test_the_seed_of_the_look_ahead_matters():
    inp = random_input(3)
    a, b = (ref.compress_head(inp, params_for(inp, 20, seed=seed)).rows.s_use for seed in (1, 2))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_cores_can_be_compressed_again(method):
    """Two passes in a row, as a cache does it: the window of the first is part of the stage of the second."""
    inp = random_input(0)
    first = run_method(method, inp, 20)
    k, v, bias = ref.rows_after(inp, first)
    more = random_input(1)
    next_id = int(inp.chunk[-1]) + 1
    second = ref.PassInput(
        k=np.concatenate([k, more.k[:40]]),
        v=np.concatenate([v, more.v[:40]]),
        bias=np.concatenate([bias, np.zeros(40)]),
        n_sink=4,
        n_win=8,
        chunk=np.concatenate([first.rows.chunk, ref.chunk_ids([False] * 40, 32, next_id)]),
        s_use=first.rows.s_use,
        n_tok=first.rows.n_tok,
        q=np.concatenate([inp.q[-8:], more.q[:40]]),
        pos_q=np.arange(392, 440),
    )
    result = run_method(method, second, 20)
    assert second.n_core == len(first.rows) and second.n_new == 40
    assert 0 < len(result.rows) <= 20
    assert np.all(np.diff(result.rows.chunk) >= 0)
    if method == "semantic":
        assert result.rows.n_tok.max() > 1 and np.all(np.isfinite(result.rows.bias))


def test_no_candidates_no_cores():
    inp = random_input(0, n_core=0, n_new=0)
    assert len(ref.compress_head(inp, params_for(inp, 5)).rows) == 0


def test_inputs_must_describe_the_same_rows():
    inp = random_input(0)
    with pytest.raises(ValueError, match="expected 50 entries of chunk, got 49"):
        replace(inp, chunk=inp.chunk[1:])
    with pytest.raises(ValueError, match="expected 47 query positions, got 48"):
        replace(inp, q=inp.q[1:])
    with pytest.raises(ValueError, match="expected a budget >= 0"):
        params_for(inp, -1)
    with pytest.raises(ValueError, match="expected a budget >= 0"):
        ref.compress_head_streaming(inp, -1)


# ------------------------------------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("budget", [10, 25, 40])
def test_paper_rows(seed, budget):
    inp = random_input(seed)
    rows = inp.candidates()
    result = ref.compress_head_paper(inp, budget)
    np.testing.assert_allclose(result.rows.bias, np.log(result.rows.n_tok), atol=1e-15)
    assert not np.any(result.rows.s_use)
    for j in range(len(result.rows)):
        members = result.member_of == j
        np.testing.assert_allclose(
            result.rows.k[j], np.average(rows.k[members], axis=0, weights=rows.n_tok[members]), atol=1e-12
        )
        np.testing.assert_allclose(
            result.rows.v[j], np.average(rows.v[members], axis=0, weights=rows.n_tok[members]), atol=1e-12
        )
        assert result.winner[j] == np.flatnonzero(members)[0]  # the seed is the first in reading order
    kept = dict(ref.chunk_budgets(rows.chunk, rows.n_tok, budget))
    for chunk, n in zip(*np.unique(result.rows.chunk, return_counts=True), strict=True):
        assert n <= kept[chunk]
    assert set(kept) == set(result.rows.chunk)
    assert all(c < min(kept) for c in set(rows.chunk) - set(kept))  # the oldest chunks go


def test_paper_budgets_by_hand():
    chunk, n_tok = np.array([0, 0, 1, 1, 1, 2]), np.array([3, 1, 1, 1, 1, 1])
    assert ref.chunk_budgets(chunk, n_tok, 4) == [(0, 2), (1, 1), (2, 1)]
    assert ref.chunk_budgets(chunk, n_tok, 2) == [(1, 1), (2, 1)]
    assert ref.chunk_budgets(chunk, n_tok, 0) == []


def test_greedy_clusters_by_hand():
    degrees = np.radians([0, 50, 20, 65, 90])
    cosine = ref.cosines(np.stack([np.cos(degrees), np.sin(degrees)], axis=1))
    assert ref.greedy_clusters(cosine, math.cos(math.radians(30))).tolist() == [0, 1, 0, 1, 4]
    assert ref.greedy_clusters(cosine, -1.0).tolist() == [0] * 5
    assert ref.threshold_clusters(cosine, 3).tolist() == [0, 1, 0, 1, 4]
    assert ref.threshold_clusters(cosine, 5).tolist() == [0, 1, 2, 3, 4]
    assert ref.threshold_clusters(cosine, 1).tolist() == [0] * 5


def test_the_cosine_of_a_zero_key_is_zero():
    assert ref.cosines(np.array([[0.0, 0.0], [1.0, 1.0]]))[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("n", [2, 9])
def test_paper_merges_identical_tokens_exactly(n):
    base = random_input(n, n_core=0, n_new=n)
    k, v = base.k.copy(), base.v.copy()
    k[base.cand], v[base.cand] = k[4], v[4]
    inp = replace(base, k=k, v=v, chunk=np.zeros(n))
    result = ref.compress_head_paper(inp, 1)
    assert result.rows.bias == pytest.approx([math.log(n)], abs=1e-12)
    np.testing.assert_allclose(
        attend_after(inp, result, inp.q, 0.25), ref.attend(inp.q, k, v, inp.bias, 0.25), atol=1e-12
    )


def test_streaming_keeps_the_newest():
    inp = random_input(0)
    result = ref.compress_head_streaming(inp, 13)
    assert result.winner.tolist() == list(range(37, 50))
    np.testing.assert_array_equal(result.rows.k, inp.k[4 + 37 : 4 + 50])
    assert (result.n_merged, result.n_dropped) == (0, 37)


@pytest.mark.parametrize("method", ["paper", "streaming"])
def test_baselines_below_budget_change_nothing(method):
    inp = random_input(0)
    for got, before in zip(ref.rows_after(inp, run_method(method, inp, 50)), (inp.k, inp.v, inp.bias), strict=True):
        np.testing.assert_array_equal(got, before)


# -------------------------------------------------------------------------------------------------------------- profile


def random_profile(seed=0, n_head=6):
    rng = np.random.default_rng(seed)
    errors = np.sort(10.0 ** -rng.uniform(1, 4, (n_head, len(ref.PARTS))), axis=1)[:, ::-1]
    errors = [[float(f"{x:.4e}") for x in row] for row in errors]
    return ref.Profile(
        "a model, 135M:abc", 4, ref.PARTS, tuple((il, h) for il in range(n_head // 2) for h in range(2)), errors
    )


def test_profile_file_round_trip(tmp_path):
    profile = random_profile()
    ref.write_profile(tmp_path / "p.txt", profile)
    back = ref.read_profile(tmp_path / "p.txt")
    assert (back.model_id, back.n_text, back.parts, back.heads) == (
        profile.model_id,
        profile.n_text,
        profile.parts,
        profile.heads,
    )
    np.testing.assert_array_equal(back.errors, profile.errors)
    ref.write_profile(tmp_path / "q.txt", back)
    assert (tmp_path / "p.txt").read_bytes() == (tmp_path / "q.txt").read_bytes()


def test_profile_file_text(tmp_path):
    ref.write_profile(tmp_path / "p.txt", ref.Profile("m", 2, (0.03125, 0.5), ((0, 0), (3, 1)), [[0.5, 0.25], [1, 0]]))
    assert (tmp_path / "p.txt").read_bytes() == (
        b"semcache-profile 3\nmodel_id m\nn_text 2\nparts 0.03125 0.5\n"
        b"head 0 0 5.0000e-01 2.5000e-01\nhead 3 1 1.0000e+00 0.0000e+00\n"
    )


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("semcache-profile 3", "semcache-profile 1", "line 1: expected 'semcache-profile 3'"),
        ("semcache-profile 3\n", "", "line 1: expected"),
        ("model_id a", "model a", "line 2: expected 'model_id"),
        ("n_text 4", "n_text four", "line 3: expected 'n_text"),
        ("n_text 4", "n_text 0", "expected n_text >= 1"),
        ("parts 0.0078125", "parts x", "line 4: expected 'parts"),
        ("parts 0.0078125 0.015625", "parts 0.015625 0.0078125", "expected parts that rise"),
        ("0.25 0.5", "0.25 1", "expected parts that rise"),
        ("head 0 1", "head 0 0", "each once and ordered"),
        ("head 1 0", "head 1", "line 7: expected 'head <il> <head> <7 errors>'"),
        ("head 1 0 ", "head 1 0 -", "expected errors of at least 0"),
        ("head 1 0 ", "head 1 0 x", "line 7"),
    ],
)
def test_malformed_profiles_are_refused(tmp_path, old, new, message):
    path = tmp_path / "p.txt"
    ref.write_profile(path, random_profile())
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        ref.read_profile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("error", [math.nan, -0.1, math.inf])
def test_errors_out_of_range_are_refused(error):
    with pytest.raises(ValueError, match="expected errors of at least 0"):
        replace(random_profile(), errors=np.full((6, len(ref.PARTS)), error))


def test_a_profile_without_heads_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("semcache-profile 3\nmodel_id m\nn_text 1\nparts 0.5\n")
    with pytest.raises(ValueError, match="expected at least one head"):
        ref.read_profile(tmp_path / "p.txt")


def test_error_at_and_between_the_knots():
    parts, errors = (0.125, 0.25, 0.5), (8.0, 2.0, 1.0)
    assert [ref.error_at(parts, errors, x) for x in parts] == pytest.approx(errors, rel=1e-12)
    assert ref.error_at(parts, errors, 0.01) == 8.0
    assert ref.error_at(parts, errors, math.sqrt(0.125 * 0.25)) == pytest.approx(4.0)
    assert ref.error_at(parts, errors, 0.75) == pytest.approx(0.5)
    assert ref.error_at(parts, errors, 1.0) == 0.0
    assert ref.error_at(parts, (8.0, 0.0, 0.0), 0.2) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_are_a_convex_hull(seed):
    rng = np.random.default_rng(seed)
    errors = rng.random(len(ref.PARTS)) * np.array(ref.PARTS) ** -0.7
    hull = ref.steps(ref.PARTS, errors, 4096, 36)
    rows, below = np.array(hull).T
    assert (rows[0], rows[-1], below[-1]) == (36, 4096, 0)
    gains = -np.diff(below) / np.diff(rows)
    assert (np.diff(gains) < 0).all() and (gains >= 0).all()
    falling = np.minimum.accumulate(errors)
    for n in range(36, 4097, 97):  # nowhere above the curve
        assert np.interp(n, rows, below) <= ref.error_at(ref.PARTS, falling, n / 4096) * 1.05 + 1e-12


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, math.nan])
def test_ratios_out_of_range_are_refused(ratio):
    for call in (lambda: ref.equal_budgets(3, ratio, 100, 4), lambda: ref.budgets(random_profile(), ratio, 100, 4)):
        with pytest.raises(ValueError, match="expected 0 < ratio <= 1"):
            call()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio, n_ctx", [(0.25, 8192), (0.1, 1000), (0.5, 777), (0.9, 512), (1.0, 300), (0.04, 2000)])
def test_budgets_sum_up_and_respect_their_bounds(seed, ratio, n_ctx):
    rows = ref.budgets(random_profile(seed, 24), ratio, n_ctx, 4)
    assert rows.sum() == math.floor(ratio * n_ctx * 24 + 0.5)
    assert rows.min() >= 36 and rows.max() <= n_ctx


@pytest.mark.parametrize("seed", SEEDS)
def test_no_exchange_of_rows_between_two_heads_is_better(seed):
    profile = random_profile(seed, 10)
    n_ctx = 2048
    hulls = [np.array(ref.steps(profile.parts, errors, n_ctx, 36)).T for errors in profile.errors]
    rows = ref.budgets(profile, 0.3, n_ctx, 4)
    for a in range(10):
        for b in range(10):
            for n in (1, 50, 400):
                if a != b and rows[a] - n >= 36 and rows[b] + n <= n_ctx:
                    more = np.interp(rows[a] - n, *hulls[a]) + np.interp(rows[b] + n, *hulls[b])
                    assert more >= np.interp(rows[a], *hulls[a]) + np.interp(rows[b], *hulls[b]) - 1e-12


def test_a_head_without_error_gets_the_least():
    parts = ref.PARTS
    profile = ref.Profile("m", 1, parts, ((0, 0), (0, 1)), [np.zeros(len(parts)), 1 / np.array(parts)])
    assert ref.budgets(profile, 0.5, 1000, 4).tolist() == [36, 964]


@pytest.mark.parametrize(
    "ratio, n_ctx, n_head, expected",
    [
        (0.25, 8192, 3, [2048] * 3),
        (0.25, 1023, 7, [256] * 5 + [255] * 2),  # 1790 rows; the lower heads get what is left over
        (1.0, 20, 2, [20] * 2),  # n_ctx below n_sink + n_chunk
    ],
)
def test_equal_budgets(ratio, n_ctx, n_head, expected):
    assert ref.equal_budgets(n_head, ratio, n_ctx, 4).tolist() == expected


def test_budgets_too_small_are_refused():
    for call in (lambda: ref.equal_budgets(2, 0.1, 350, 4), lambda: ref.budgets(random_profile(), 0.1, 350, 4)):
        with pytest.raises(ValueError, match="expected at least 36 rows per kv head"):
            call()


# ---------------------------------------------------------------------------------------------------------- calibration


def random_text(seed, n_past=60, n_exact=24, n_probe=12, n_sink=2, same=False):
    rng = np.random.default_rng(seed)
    n = n_past + n_exact
    k, v, q = 1.5 * rng.standard_normal((n, 8)), rng.standard_normal((n, 6)), 1.5 * rng.standard_normal((n, 2, 8))
    if same:
        k[:], v[:] = k[0], v[0]
    chunk = ref.chunk_ids(rng.random(n_past - n_sink) < 0.2, 8, 0)
    return ref.TextInput(k, v, q, np.arange(n), chunk, n_sink, n_exact, n_probe)


TEXT_PARAMS = ref.PassParams(
    scale=8**-0.5, softcap=0.0, inv_freq=np.zeros(0), rope_neox=True, n_past=0, n_horizon=64, seed=0, budget=0
)


def test_no_error_with_all_rows_or_identical_ones():
    errors = ref.output_errors(random_text(0), TEXT_PARAMS, (0.2, 1.0), n_pass=25, n_window=12, n_skip=2)
    assert errors[0] > 1e-4 and errors[1] < 1e-25
    assert ref.output_errors(random_text(0, same=True), TEXT_PARAMS, (0.2,), n_pass=25, n_window=12)[0] < 1e-20


@pytest.mark.parametrize("seed", SEEDS)
def test_errors_of_one_pass_by_hand(seed):
    """A single pass, one probe: attention over what the pass leaves against attention over all."""
    text = random_text(seed, n_probe=1)
    n, past = len(text.k), text.n_past
    got = ref.output_errors(text, TEXT_PARAMS, (0.3,), n_pass=100, n_window=24)
    inp = ref.PassInput(
        text.k,
        text.v,
        np.zeros(n),
        text.n_sink,
        n - past,
        text.chunk,
        [],
        [],
        text.q[:: ref.VOTE_EVERY],
        text.pos[:: ref.VOTE_EVERY],
    )
    result = ref.compress_head(inp, replace(TEXT_PARAMS, n_past=n, n_ahead=24, budget=18 - text.n_sink))
    k, v, bias = ref.rows_after(inp, result)
    out = ref.attend(text.q[-1:], k, v, bias, TEXT_PARAMS.scale) - ref.attend(
        text.q[-1:], text.k, text.v, np.zeros(n), TEXT_PARAMS.scale
    )
    assert got == pytest.approx([np.mean(np.sum(out**2, axis=-1))], rel=1e-9)


def test_passes_cover_the_text_once():
    text = random_text(3)
    cores = ref.read_in_passes(text, replace(TEXT_PARAMS, budget=20), 25, 12)
    assert len(cores) == 20 and (np.diff(cores.chunk) >= 0).all()
    assert cores.n_tok.sum() <= text.n_past - text.n_sink
    everything = ref.read_in_passes(text, replace(TEXT_PARAMS, budget=1000), 25, 12)
    np.testing.assert_array_equal(everything.k, text.k[text.n_sink : text.n_past])


# --------------------------------------------------------------------------------------------------------- golden files


@pytest.fixture(scope="module")
def make_golden():
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# numpy and its BLAS round and add in an order of their own on every processor: of the float64 values behind a file,
# some thousand operations deep, 1e-12 is not theirs to choose. Rounded to float32 they may come out one unit apart.
F64_RTOL = 1e-12
F32_RTOL = 2.0**-23


def assert_same_golden(name, got, want):
    """Files of one name are equal but for the last digits of floats."""
    if name.endswith(".bin"):
        got, want = read_case(got), read_case(want)
        assert got.keys() == want.keys()
        for field, x in want.items():
            if getattr(x, "dtype", None) == np.float64:
                atol = F64_RTOL * np.abs(x).max(initial=0)
                np.testing.assert_allclose(got[field], x, rtol=F32_RTOL, atol=atol, err_msg=f"{name}: {field}")
            else:
                np.testing.assert_array_equal(got[field], x, err_msg=f"{name}: {field}")
        return
    got, want = got.decode().splitlines(), want.decode().splitlines()
    assert len(got) == len(want), name
    for line, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        a, b = a.split(" "), b.split(" ")
        assert len(a) == len(b), (name, line)
        for x, y in zip(a, b, strict=True):
            assert x == y or "." in y and float(x) == pytest.approx(float(y), rel=F64_RTOL, abs=0), (name, line)


def test_golden_files_are_what_the_generator_writes(make_golden):
    files = make_golden.golden_files()
    on_disk = {p.name for p in GOLDEN.iterdir() if p.suffix in (".bin", ".txt")}
    assert on_disk == set(files)
    for name, data in files.items():
        assert_same_golden(name, data, (GOLDEN / name).read_bytes())
    assert sum(map(len, files.values())) < 4_000_000


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the names of OpenBLAS's kernels are those of x86-64"
)
def test_golden_files_of_another_processor_are_the_same(tmp_path):
    """Prescott has no AVX, so its kernels run everywhere and round in an order of their own."""
    env = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}
    subprocess.run(
        [sys.executable, GOLDEN / "make_golden.py", tmp_path], env=env, check=True, stdout=subprocess.DEVNULL
    )
    for path in tmp_path.iterdir():
        assert_same_golden(path.name, path.read_bytes(), (GOLDEN / path.name).read_bytes())


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tables.txt", b"budgets 0.25 ", b"budgets 0.26 "),
        ("tables.txt", b"splitmix64 1 ", b"splitmix64 2 "),
        ("profile.txt", b"8.4219e-03", b"8.4220e-03"),
        ("streaming.bin", struct.pack("<f", 32**-0.5), struct.pack("<f", 32**-0.5 * (1 + 2.0**-22))),
    ],
)
def test_another_number_in_a_golden_file_is_seen(name, old, new):
    data = (GOLDEN / name).read_bytes()
    assert old in data
    with pytest.raises(AssertionError):
        assert_same_golden(name, data.replace(old, new, 1), data)


EVICTING = dict(enumerate(ref.POLICIES, start=3))
CASE_NAMES = (GOLDEN / "index.txt").read_text().split()


def read_case(data):
    """Read a case as its documentation describes it, without the generator."""
    h = struct.unpack_from("<32i", data)
    keys = (
        *(
            "magic",
            "version",
            "method",
            "d_k",
            "d_v",
            "gqa",
            "n_rot",
            "rope_neox",
            "n_sink",
            "n_core",
            "n_new",
            "n_win",
        ),
        *("n_past", "n_horizon", "seed_low", "seed_high", "budget", "merge", "n_out", "n_merged", "n_dropped"),
        *("attempt", "n_q", "n_ahead", "n_full", "distinct"),
    )
    c = dict(zip(keys, h, strict=False))  # the rest is kept free
    assert (c["magic"], c["version"]) == (0x43474353, 5) and not any(h[26:])
    n_cand, n_stage, n_q = c["n_core"] + c["n_new"], c["n_new"] + c["n_win"], c["n_q"]
    n_rows, n_out = c["n_sink"] + n_cand + c["n_win"], c["n_out"]
    at = 128
    for name, code, *shape in (
        ("scale_softcap", "f", 2),
        ("inv_freq", "f", c["n_rot"] // 2),
        ("pos_q", "i", n_q),
        ("chunk", "i", n_cand),
        ("n_tok", "i", c["n_core"]),
        ("s_use", "f", c["n_core"]),
        ("bias", "f", n_rows),
        ("k", "f", n_rows, c["d_k"]),
        ("v", "f", n_rows, c["d_v"]),
        ("q", "f", n_q, c["gqa"], c["d_k"]),
        ("votes_n", "i", n_stage),
        ("votes_p4", "f", n_stage),
        ("votes_p", "f", n_stage),
        ("u", "i", n_q),
        ("score_s_use", "f", n_cand),
        ("score_s_dev", "f", n_cand),
        ("score_w", "f", n_cand),
        ("taken_p4", "f", n_stage),
        ("taken_p", "f", n_stage),
        ("winner", "i", n_out),
        ("member_of", "i", n_cand),
        ("out_chunk", "i", n_out),
        ("out_n_tok", "i", n_out),
        ("out_s_use", "f", n_out),
        ("out_bias", "f", n_out),
        ("out_k", "f", n_out, c["d_k"]),
        ("out_v", "f", n_out, c["d_v"]),
    ):
        n = math.prod(shape)
        c[name] = np.array(
            struct.unpack_from(f"<{n}{code}", data, at), dtype=np.float64 if code == "f" else np.int64
        ).reshape(shape)
        at += 4 * n
    assert at == len(data)
    return c


@pytest.mark.parametrize("name", CASE_NAMES)
def test_golden_case_reads_as_documented(name):
    c = read_case((GOLDEN / f"{name}.bin").read_bytes())
    seed = (c["seed_high"] & 0xFFFFFFFF) << 32 | c["seed_low"] & 0xFFFFFFFF
    inp = ref.PassInput(
        c["k"],
        c["v"],
        c["bias"],
        c["n_sink"],
        c["n_win"],
        c["chunk"],
        c["s_use"],
        c["n_tok"],
        c["q"],
        c["pos_q"],
        ref.Votes(c["votes_n"], c["votes_p4"], c["votes_p"]),
    )
    for x in (c["k"], c["v"], c["q"]):
        np.testing.assert_array_equal(x.astype(np.float16), x)
    params = ref.PassParams(
        *c["scale_softcap"],
        c["inv_freq"],
        bool(c["rope_neox"]),
        c["n_past"],
        c["n_horizon"],
        seed,
        c["budget"],
        bool(c["merge"]),
        c["n_ahead"],
        c["n_full"],
        c["distinct"],
    )
    if c["method"] == 0:
        result = ref.compress_head(inp, params)
        scores = ref.score(inp, params, ref.look_ahead(inp, params))
        np.testing.assert_array_equal(c["u"], ref.horizon_positions(inp.pos_q, params.n_horizon, seed))
        np.testing.assert_allclose(c["score_s_use"], scores.s_use, rtol=1e-6)
        np.testing.assert_allclose(c["score_s_dev"], scores.s_dev, rtol=1e-6)
        np.testing.assert_allclose(c["score_w"], scores.w, rtol=1e-6)
        votes = ref.take_votes(inp, params, ref.look_ahead(inp, params))
        np.testing.assert_allclose(c["taken_p4"], votes.p4, rtol=1e-6)
        np.testing.assert_allclose(c["taken_p"], votes.p, rtol=1e-6)
    elif c["method"] in EVICTING:
        result = ref.compress_head_evict(inp, params, EVICTING[c["method"]])
    else:
        method = {1: ref.compress_head_paper, 2: ref.compress_head_streaming}[c["method"]]
        result = method(inp, c["budget"])
    np.testing.assert_array_equal(c["winner"], result.winner)
    np.testing.assert_array_equal(c["member_of"], result.member_of)
    assert (c["n_merged"], c["n_dropped"]) == (result.n_merged, result.n_dropped)
    for field in ("chunk", "n_tok", "s_use", "bias", "k", "v"):
        np.testing.assert_allclose(c[f"out_{field}"], getattr(result.rows, field), rtol=1e-6, err_msg=field)


def test_golden_cases_cover_what_they_should():
    cases = [read_case((GOLDEN / f"{name}.bin").read_bytes()) for name in CASE_NAMES]
    assert {c["method"] for c in cases} == {0, 1, 2, *EVICTING}
    passes = [c for c in cases if c["method"] == 0]
    assert {32, 64, 80} <= {c["d_k"] for c in passes} and {1, 3, 7} <= {c["gqa"] for c in passes}
    assert {(c["n_rot"] > 0, c["n_rot"] == c["d_k"], c["rope_neox"]) for c in passes} >= {
        (True, True, 0),
        (True, True, 1),
        (True, False, 0),
        (True, False, 1),
        (False, False, 0),
    }
    assert any(c["scale_softcap"][1] > 0 for c in passes)
    assert any(c["n_core"] == 0 for c in passes) and any(c["n_core"] > 0 for c in passes)
    assert any(c["n_merged"] and c["n_dropped"] for c in passes)
    assert any(c["n_out"] == c["n_core"] + c["n_new"] for c in passes)
    assert any(not c["merge"] for c in passes) and any(c["d_v"] != c["d_k"] for c in passes)
    assert any(8.0 in c["out_bias"] for c in passes)
    assert any(
        0 < c["n_q"] < c["n_new"] + c["n_win"] and c["n_new"] and any(c["votes_n"]) and c["n_ahead"] for c in passes
    )
    assert {(c["n_core"] > 0, c["n_new"] > 0) for c in passes} >= {
        (False, False),
        (True, False),
    }  # passes that only take votes
    assert any(c["n_q"] >= 192 for c in passes)  # the bias is fitted on every second token
    assert {c["method"] for c in cases if c["n_q"] >= 192} >= {
        5,
        6,
        7,
    }  # where a policy still reads all of them in order
    assert any(c["n_q"] < c["n_full"] and c["n_core"] for c in passes)
    papers = [c for c in cases if c["method"] == 1]
    assert any(c["n_dropped"] for c in papers) and any(c["n_core"] for c in papers)


def policy_input(k, q, pos_q, n_win, n_past, **more):
    n, n_core = len(k) - n_win, len(more.get("s_use", ()))
    return ref.PassInput(
        k,
        np.zeros((len(k), 2)),
        np.zeros(len(k)),
        0,
        n_win,
        np.zeros(n),
        more.pop("s_use", ()),
        np.ones(n_core),
        q,
        pos_q,
        **more,
    )


def test_eviction_by_hand():
    """Keys of two dimensions; logits are log 3 where key and query agree, and 0 elsewhere."""
    params = ref.PassParams(1.0, 0.0, np.zeros(0), True, n_past=4, n_horizon=1, seed=0, budget=2)
    k = [[1, 0], [0, 2], [3, 0], [0, 1]]
    q = np.array([[[np.log(3), 0]], [[0, np.log(3)]]])  # of the tokens at 1 and 3
    inp = policy_input(k, q, [1, 3], 1, 4)
    np.testing.assert_allclose(ref.POLICIES["knorm"](inp, params), [-1, -2, -3, -1])
    assert ref.compress_head_evict(inp, params, "knorm").winner.tolist() == [0, 1]
    np.testing.assert_allclose(ref.POLICIES["keydiff"](inp, params), -np.array([2, 1, 2, 1]) / np.sqrt(5))
    assert ref.compress_head_evict(inp, replace(params, budget=1), "keydiff").winner.tolist() == [1]
    first, second = np.array([3, 1, 0, 0]) / 4, np.array([1, 9, 1, 3]) / 14
    np.testing.assert_allclose(ref.POLICIES["tova"](inp, params), second)
    np.testing.assert_allclose(ref.POLICIES["h2o"](inp, params), first + second)
    assert ref.compress_head_evict(inp, params, "h2o").winner.tolist() == [0, 1], "the window is the newest half"
    assert ref.compress_head_evict(replace(inp, n_win=0, chunk=np.zeros(4)), params, "h2o").winner.tolist() == [1, 3], (
        "half of the budget for the newest"
    )
    votes = ref.Votes(np.array([2, 0, 0]), np.zeros(3), np.array([0.5, 9, 9]))
    later = policy_input(k, q, [1, 3], 1, 4, s_use=[0.25], votes=votes)
    np.testing.assert_allclose(ref.POLICIES["h2o"](later, params), first + second + [0.25, 0.5, 0, 0])
    smooth = first + second
    np.testing.assert_allclose(ref.POLICIES["snapkv"](inp, params), [*np.full(3, smooth[:3].sum() / 5), smooth[3]])
    far = replace(inp, pos_q=np.array([1 - 64, 3]))
    np.testing.assert_allclose(ref.POLICIES["snapkv"](far, params)[3], second[3])


@pytest.mark.parametrize("policy", ref.POLICIES)
def test_eviction_keeps_rows_as_they_are(policy):
    rng = np.random.RandomState(0)
    inp = policy_input(
        rng.standard_normal((30, 8)), rng.standard_normal((6, 2, 8)), np.arange(34, 40), 6, 40, s_use=np.ones(10)
    )
    params = ref.PassParams(0.5, 0.0, np.zeros(0), True, n_past=40, n_horizon=1, seed=0, budget=9)
    result = ref.compress_head_evict(inp, params, policy)
    assert len(result.rows) == 9 and result.n_dropped == 15 and result.n_merged == 0
    np.testing.assert_array_equal(result.rows.k, inp.k[result.winner])
    assert ref.compress_head_evict(inp, replace(params, budget=24), policy).n_dropped == 0

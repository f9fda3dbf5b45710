"""Write the golden files from the numpy reference: `python tests/golden/make_golden.py [FOLDER]`.

Inputs are drawn with numpy's frozen legacy generator, so the files come out the same everywhere but for the last digits
of floats, which depend on the processor; a test checks that they do.
A float32 implementation must reach the decisions in them (winners, clusters), so every case is drawn again until they
have margins, see `has_margins`.

Files
-----
index.txt     names of the cases, one a line
<name>.bin    one case, layout below
profile.txt   a profile file
tables.txt    the small functions; one call a line, see `tables`

Layout of a case
----------------
Little-endian, no padding, every value 4 bytes (int32 or float32), arrays in C order (last axis fastest). First 32
int32:

     0 magic 0x43474353 (bytes "SCGC")    12 n_past
     1 version, 5                         13 n_horizon
     2 method, enum semcache_method       14 seed, low 32 bits
     3 d_k                                15 seed, high 32 bits
     4 d_v                                16 budget
     5 gqa                                17 merge, 0 or 1
     6 n_rot, 0 without RoPE              18 n_out
     7 rope_neox, 0 or 1                  19 n_merged
     8 n_sink                             20 n_dropped
     9 n_core                             21 attempt that had margins
    10 n_new                              22 n_q
    11 n_win                              23 n_ahead
    24 n_full                             25 distinct
                                          26 .. 31 zero

With n_cand = n_core + n_new, T = n_sink + n_cand + n_win and n_stage = n_new + n_win, then the inputs

    scale, softcap   float32 [2]
    inv_freq         float32 [n_rot / 2]
    pos_q            int32   [n_q]
    chunk            int32   [n_cand]
    n_tok            int32   [n_core]
    s_use            float32 [n_core]            values that float16 holds exactly
    bias             float32 [T]                 likewise
    k                float32 [T, d_k]            likewise
    v                float32 [T, d_v]            likewise
    q                float32 [n_q, gqa, d_k]     likewise
    votes_n          int32   [n_stage]           votes of earlier passes on new rows and window
    votes_p4         float32 [n_stage]
    votes_p          float32 [n_stage]

and the reference's outputs, computed in float64 from these and rounded to float32 at the end:

    u                int32   [n_q]               look-ahead positions of step 1
    score_s_use      float32 [n_cand]            step 3, before old scores of cores are mixed in;
    score_s_dev      float32 [n_cand]            these six are zero for methods other than the semantic one
    score_w          float32 [n_cand]
    taken_p4         float32 [n_stage]           the votes with those of this pass
    taken_p          float32 [n_stage]           of an eviction policy: its scores
    winner           int32   [n_out]             candidate whose place each core takes
    member_of        int32   [n_cand]            row that each candidate is part of afterwards, -1: dropped
    out_chunk        int32   [n_out]
    out_n_tok        int32   [n_out]
    out_s_use        float32 [n_out]
    out_bias         float32 [n_out]
    out_k            float32 [n_out, d_k]
    out_v            float32 [n_out, d_v]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent
sys.path.append(
    str(GOLDEN.parents[1] / "python" / "llama_semanticache")
)  # appended: its profile.py must not hide the standard one

import reference  # noqa: E402

MAGIC = 0x43474353
SEMANTIC, PAPER, STREAMING = range(3)
EVICTING = dict(enumerate(reference.POLICIES, start=3))  # enum semcache_method: name
MARGIN = 1e-3
"""Least relative distance of every decision's best from its runner-up; float32 sums of these lengths err below 1e-4."""

COSINE_NOISE = 1e-5
"""The paper's clusters must come out the same with cosines that are off by this much; in float32 they err below
1e-6.
"""


@dataclass(frozen=True)
class Case:
    """Sizes of one case; see the layout for the names."""

    name: str
    method: int = SEMANTIC
    d_k: int = 64
    d_v: int = 64
    gqa: int = 3
    n_rot: int = 64
    rope_neox: bool = False
    n_sink: int = 4
    n_core: int = 0
    n_new: int = 40
    n_win: int = 8
    n_past: int = 0  # 0: the first pass
    n_horizon: int = 512
    seed: int = 0
    budget: int = 16
    merge: bool = True
    softcap: float = 0.0
    outliers: bool = False  # large channels and large single keys and queries
    n_q: int = 0  # 0: the whole stage votes
    n_ahead: int = 0
    n_full: int = 0
    voted: bool = False  # the stage has votes of earlier passes
    distinct: int = reference.DISTINCT
    lost: bool = False  # a new row that no output needs takes nearly all attention of some queries, and goes
    heavy_cores: bool = (
        False  # two cores of one chunk with biases near the upper bound, so that their merged bias is clamped
    )


CASES = (
    Case("first-pass", d_k=64, d_v=64, gqa=3, n_rot=64, rope_neox=False),
    Case("cores-norm-gqa3", n_core=20, n_past=1500, budget=22, seed=7),
    Case(
        "cores-neox-gqa7-outliers",
        gqa=7,
        rope_neox=True,
        n_core=18,
        n_new=30,
        n_past=900,
        budget=18,
        seed=2**64 - 500,
        outliers=True,
    ),
    Case("no-rope-gqa1", d_k=32, d_v=32, gqa=1, n_rot=0, n_new=190, n_win=11, budget=50),
    Case(
        "partial-rope-d80",
        d_k=80,
        d_v=80,
        gqa=1,
        n_rot=32,
        rope_neox=True,
        n_core=15,
        n_new=37,
        n_win=9,
        n_past=3001,
        n_horizon=4096,
        budget=19,
    ),
    Case(
        "partial-rope-norm-dv48",
        d_k=32,
        d_v=48,
        gqa=3,
        n_rot=20,
        n_sink=0,
        n_core=9,
        n_new=33,
        n_win=5,
        n_past=261,
        budget=13,
    ),
    Case(
        "softcap-outliers",
        d_k=80,
        d_v=80,
        gqa=3,
        n_rot=80,
        rope_neox=True,
        n_core=12,
        n_new=28,
        n_past=700,
        softcap=20.0,
        outliers=True,
    ),
    Case(
        "no-merge", d_k=32, d_v=32, n_rot=32, rope_neox=True, n_core=20, n_past=640, budget=20, merge=False, distinct=0
    ),
    Case("below-budget", d_k=32, d_v=32, n_rot=32, n_core=12, n_new=20, n_past=320, budget=32),
    Case("votes", n_core=20, n_new=34, n_win=40, n_past=1200, n_q=24, n_ahead=40, budget=24, voted=True),
    Case(
        "few-votes-on-cores",
        d_k=8,
        d_v=8,
        n_rot=8,
        n_core=24,
        n_new=30,
        n_win=20,
        n_past=800,
        n_q=6,
        n_full=60,
        budget=26,
        voted=True,
    ),
    Case(
        "votes-only",
        d_k=32,
        d_v=32,
        gqa=2,
        n_rot=32,
        n_sink=0,
        n_new=0,
        n_win=30,
        n_past=30,
        n_q=12,
        n_ahead=64,
        voted=True,
    ),
    Case(
        "votes-on-cores",
        d_k=32,
        d_v=32,
        n_rot=32,
        n_core=12,
        n_new=0,
        n_win=20,
        n_past=300,
        n_q=10,
        budget=12,
        voted=True,
    ),
    Case(
        "lost-queries", d_k=16, d_v=16, gqa=2, n_rot=0, n_core=12, n_new=26, n_win=9, n_past=500, budget=14, lost=True
    ),
    Case("clamped-bias", d_k=32, d_v=32, n_rot=32, n_core=2, n_new=10, n_win=4, n_past=100, budget=1, heavy_cores=True),
    Case(
        "large-first-pass", d_k=128, d_v=128, gqa=4, n_rot=128, rope_neox=True, n_new=256, n_win=64, budget=100, n_q=64
    ),
    Case(
        "large-cores",
        n_core=140,
        n_new=256,
        n_win=96,
        n_past=4000,
        n_q=128,
        n_ahead=96,
        n_full=126,
        budget=150,
        voted=True,
    ),
    Case(
        "large-stride",
        d_k=32,
        d_v=64,
        gqa=2,
        n_rot=32,
        n_core=60,
        n_new=300,
        n_win=40,
        n_past=2000,
        n_q=200,
        budget=90,
        voted=True,
        outliers=True,
    ),
    Case(
        "large-distinct",
        d_k=64,
        d_v=48,
        gqa=7,
        n_core=80,
        n_new=200,
        n_win=64,
        n_past=1000,
        n_q=50,
        budget=160,
        distinct=100,
    ),
    Case(
        "large-softcap",
        d_k=80,
        d_v=80,
        gqa=2,
        n_rot=40,
        n_core=100,
        n_new=160,
        n_win=64,
        n_past=900,
        n_q=80,
        budget=110,
        softcap=30.0,
    ),
    Case("paper-first-pass", method=PAPER, gqa=1, n_new=60, budget=25),
    Case(
        "paper-cores",
        method=PAPER,
        d_k=80,
        d_v=80,
        gqa=1,
        n_rot=32,
        n_core=30,
        n_new=45,
        n_past=900,
        budget=30,
        outliers=True,
    ),
    Case(
        "paper-drops-chunks", method=PAPER, d_k=32, d_v=32, gqa=1, n_rot=32, n_core=30, n_new=45, n_past=900, budget=8
    ),
    Case("streaming", method=STREAMING, d_k=32, d_v=32, gqa=1, n_rot=32, n_core=15, n_new=25, n_past=400, budget=21),
    *(
        Case(
            name,
            method=method,
            d_k=32,
            d_v=32,
            n_rot=32,
            n_core=20,
            n_new=34,
            n_win=50,
            n_past=1200,
            n_q=44,
            budget=24,
            voted=True,
        )
        for method, name in EVICTING.items()
    ),
    Case(
        "h2o-newest",
        method=7,
        d_k=32,
        d_v=32,
        n_rot=32,
        n_core=20,
        n_new=34,
        n_win=9,
        n_past=1200,
        n_q=34,
        budget=24,
        voted=True,
    ),
    *(
        Case(
            f"{name}-many-votes",
            method=method,
            d_k=8,
            d_v=8,
            gqa=1,
            n_rot=8,
            n_core=4,
            n_new=24,
            n_win=169,
            n_past=1200,
            n_q=193,
            budget=12,
            voted=True,
        )
        for method, name in EVICTING.items()
        if name in ("snapkv", "tova", "h2o")
    ),
    Case("tova-softcap", method=6, d_k=32, d_v=32, gqa=2, n_rot=32, n_new=30, n_win=20, budget=18, softcap=3.0),
)


def draw(case: Case, attempt: int) -> tuple[reference.PassInput, reference.PassParams]:
    """Inputs of a case whose values float32 (k, v, q, bias, s_use: float16) holds exactly."""
    rng = np.random.RandomState(attempt)
    n_cand = case.n_core + case.n_new
    n_rows = case.n_sink + n_cand + case.n_win
    n_stage = case.n_new + case.n_win
    n_q = case.n_q or n_stage
    n_past = case.n_past or case.n_sink + n_q

    core_chunk = np.sort(rng.randint(0, 1 + case.n_core // 5, case.n_core)).astype(np.int32)
    new_chunk = reference.chunk_ids(rng.rand(case.n_new) < 0.08, 16, 1 + case.n_core // 5)
    chunk = np.concatenate([core_chunk, new_chunk])

    k = rng.standard_normal((n_rows, case.d_k))
    k[case.n_sink : case.n_sink + n_cand] += 0.7 * rng.standard_normal((1 + max(chunk, default=0), case.d_k))[chunk]
    v = rng.standard_normal((n_rows, case.d_v))
    q = 1.5 * rng.standard_normal((n_q, case.gqa, case.d_k))
    if case.outliers:
        k[:, 5] += 12
        k[:, -2] -= 7
        q[..., 5] += 2
        q[..., -2] *= 4
        k[rng.randint(case.n_sink, n_rows, 3)] *= 3
        q[rng.randint(0, n_q, 2)] *= 3

    n_tok = rng.randint(1, 9, case.n_core)
    n_tok[n_tok > 5] = 1
    bias = np.zeros(n_rows)
    bias[case.n_sink : case.n_sink + case.n_core] = np.log(n_tok)
    s_use = np.zeros(case.n_core)
    if case.method == SEMANTIC:
        bias[case.n_sink : case.n_sink + case.n_core] += 0.2 * rng.standard_normal(case.n_core) * (n_tok > 1)
        s_use = 0.1 * rng.rand(case.n_core)
    if case.method in EVICTING:
        n_tok[:], bias[:] = 1, 0
        s_use = 2.0 * rng.rand(case.n_core)
    if case.lost:
        lost = case.n_sink + case.n_core
        k[lost] *= 12
        v[lost] = np.mean(v[case.n_sink : case.n_sink + n_cand], axis=0)
    if case.heavy_cores:
        chunk[: case.n_core] = 0
        bias[case.n_sink : case.n_sink + case.n_core] = 7.9375

    def exact(x, dtype=np.float32):
        return np.asarray(x, dtype=dtype).astype(np.float64)

    votes = reference.Votes.none(n_stage)
    if case.voted:  # the window's last have had none
        n = 10 * (1 + np.arange(n_stage)[::-1] // 10) * (np.arange(n_stage) < n_stage - 8)
        p = rng.uniform(0, 0.04, n_stage)
        votes = reference.Votes(n, exact(case.gqa * n * (2 * p) ** 4), exact(case.gqa * n * p))

    inv_freq = exact(10000.0 ** (-2 * np.arange(case.n_rot // 2) / max(1, case.n_rot)))
    inp = reference.PassInput(
        exact(k, np.float16),
        exact(v, np.float16),
        exact(bias, np.float16),
        case.n_sink,
        case.n_win,
        chunk,
        exact(s_use, np.float16),
        n_tok,
        exact(q, np.float16),
        np.arange(n_past - n_q, n_past),
        votes,
    )
    params = reference.PassParams(
        float(exact(case.d_k**-0.5)),
        case.softcap,
        inv_freq,
        case.rope_neox,
        n_past,
        case.n_horizon,
        case.seed,
        case.budget,
        case.merge,
        case.n_ahead,
        case.n_full,
        case.distinct,
    )
    return inp, params


def run(method: int, inp: reference.PassInput, params: reference.PassParams) -> reference.PassResult:
    """The method's result."""
    if method == PAPER:
        return reference.compress_head_paper(inp, params.budget)
    if method == STREAMING:
        return reference.compress_head_streaming(inp, params.budget)
    if method in EVICTING:
        return reference.compress_head_evict(inp, params, EVICTING[method])
    return reference.compress_head(inp, params)


def has_margins(case: Case, inp: reference.PassInput, params: reference.PassParams) -> bool:
    """Whether small errors of the arithmetic leave every decision as it is."""
    if case.method == PAPER:
        return _clusters_hold(inp, params.budget)
    if case.method == STREAMING or inp.n_cand <= params.budget:
        return True
    if case.method in EVICTING:
        return _first_stand_out(reference.POLICIES[EVICTING[case.method]](inp, params)[inp.cand], params.budget)
    q = reference.look_ahead(inp, params)
    scores = reference.score(inp, params, q)
    rows = reference.update_scores(inp.candidates(), scores, inp.n_core)
    n_distinct = params.budget * params.distinct // 100
    if n_distinct and not _first_stand_out(reference.key_differences(rows.k, rows.k), n_distinct):
        return False
    if not _first_stand_out(reference.values(rows, scores, params), params.budget):
        return False
    if not params.merge:
        return True
    result = reference.compress_head(inp, params)
    metric = reference.query_metric(reference.fitted_queries(q))
    for i in np.setdiff1d(np.arange(inp.n_cand), result.winner):
        d = rows.k[i] - rows.k[result.winner[rows.chunk[result.winner] == rows.chunk[i]]]
        distance = np.sort(np.sum(d @ metric * d, axis=1))
        if len(distance) > 1 and not _apart(distance[0], distance[1]):
            return False
    merged = result.rows.bias[np.bincount(result.member_of[result.member_of >= 0], minlength=len(result.rows)) > 1]
    if case.lost:
        q = reference.fitted_queries(q)
        x = reference.logits(q, inp.k, params.scale, params.softcap) + inp.bias
        k, _, bias = reference.rows_after(inp, result)
        kept = np.exp(
            reference.logits(q, k, params.scale, params.softcap) + bias - reference.logsumexp(x)[:, None]
        ).sum(axis=1)
        if np.all(kept >= reference.LEAST_KEPT) or np.any(np.abs(np.log(kept / reference.LEAST_KEPT)) < 0.1):
            return False
    clamped = (merged <= reference.BIAS_MIN) | (merged >= reference.BIAS_MAX)
    return len(merged) > 0 and np.all(clamped == case.heavy_cores)


def _first_stand_out(value: np.ndarray, n: int) -> bool:
    """Whether the n greatest are more than the margin above the rest."""
    last, rest = np.sort(value)[::-1][n - 1 : n + 1]
    return last - rest > MARGIN * abs(rest)


def _apart(small: float, large: float) -> bool:
    return large - small > MARGIN * large


def _clusters_hold(inp: reference.PassInput, budget: int) -> bool:
    rows = inp.candidates()
    rng = np.random.RandomState(0)
    for chunk, chunk_budget in reference.chunk_budgets(rows.chunk, rows.n_tok, budget):
        cosine = reference.cosines(rows.k[rows.chunk == chunk])
        seeds = reference.threshold_clusters(cosine, chunk_budget)
        for _ in range(8):
            noisy = cosine + COSINE_NOISE * rng.uniform(-1, 1, cosine.shape)
            if not np.array_equal(reference.threshold_clusters(noisy, chunk_budget), seeds):
                return False
    return True


def case_bytes(case: Case) -> bytes:
    """The file of a case."""
    for attempt in range(1000):
        inp, params = draw(case, attempt)
        if has_margins(case, inp, params):
            break
    else:
        raise RuntimeError(
            f"expected a draw of {case.name} with margins above {MARGIN}, got none in 1000; change its sizes"
        )
    result = run(case.method, inp, params)
    u = np.zeros(len(inp.q))
    scores = reference.Scores(*np.zeros((3, inp.n_cand)))
    taken = reference.Votes.none(len(inp.votes))
    if case.method in EVICTING:
        score = reference.POLICIES[EVICTING[case.method]](inp, params)
        taken = reference.Votes(inp.votes.n, inp.votes.p4, score[inp.n_sink + inp.n_core :])
    if case.method == SEMANTIC:
        u = reference.horizon_positions(inp.pos_q, params.n_horizon, params.seed)
        q = reference.look_ahead(inp, params)
        scores, taken = reference.score(inp, params, q), reference.take_votes(inp, params, q)

    header = np.zeros(32, dtype="<u4")
    header[:26] = (
        MAGIC,
        5,
        case.method,
        case.d_k,
        case.d_v,
        case.gqa,
        case.n_rot,
        case.rope_neox,
        case.n_sink,
        case.n_core,
        case.n_new,
        case.n_win,
        params.n_past,
        case.n_horizon,
        case.seed & 0xFFFFFFFF,
        case.seed >> 32,
        case.budget,
        case.merge,
        len(result.rows),
        result.n_merged,
        result.n_dropped,
        attempt,
        len(inp.q),
        params.n_ahead,
        params.n_full,
        params.distinct,
    )
    i32, f32 = "<i4", "<f4"
    out = result.rows
    arrays = [
        ([params.scale, params.softcap], f32),
        (params.inv_freq, f32),
        (inp.pos_q, i32),
        (inp.chunk, i32),
        (inp.n_tok, i32),
        (inp.s_use, f32),
        (inp.bias, f32),
        (inp.k, f32),
        (inp.v, f32),
        (inp.q, f32),
        (inp.votes.n, i32),
        (inp.votes.p4, f32),
        (inp.votes.p, f32),
        (u, i32),
        (scores.s_use, f32),
        (scores.s_dev, f32),
        (scores.w, f32),
        (taken.p4, f32),
        (taken.p, f32),
        (result.winner, i32),
        (result.member_of, i32),
        (out.chunk, i32),
        (out.n_tok, i32),
        (out.s_use, f32),
        (out.bias, f32),
        (out.k, f32),
        (out.v, f32),
    ]
    return header.tobytes() + b"".join(np.ascontiguousarray(a, dtype=dtype).tobytes() for a, dtype in arrays)


def golden_profile() -> reference.Profile:
    """Profile of two layers with three kv heads: falling errors of all sizes, a noisy curve, one without error from a
    part on.
    """
    rng = np.random.RandomState(3)
    heads = tuple((il, head) for il in (0, 2) for head in range(3))
    parts = np.array(reference.PARTS)
    errors = (
        10.0 ** -rng.uniform(1, 4, (len(heads), 1)) * parts ** -rng.uniform(0.1, 1.5, (len(heads), 1)) * (1 - parts)
    )
    errors[1] *= rng.uniform(0.7, 1.3, len(parts))
    errors[4, 3:] = 0
    errors = [[float(f"{x:.4e}") for x in row] for row in errors]
    return reference.Profile("golden model 135M", 4, reference.PARTS, heads, errors)


def golden_text(n_past: int, n_pass: int, seed: int, noise: float = 0.0) -> tuple[reference.TextInput, np.ndarray]:
    """A text of multiples of 1/64 and its errors; `noise` is what the cores are disturbed by."""
    n_sink, n_window, n_probe, d_k, d_v, gqa = 2, 10, 12, 8, 6, 2
    rng = np.random.RandomState(seed)
    n = n_past + n_window + n_probe
    scale = [1.5, 1.0, 1.5]
    k, v, q = (
        np.round(64 * s * rng.standard_normal(shape)) / 64
        for s, shape in zip(scale, ((n, d_k), (n, d_v), (n, gqa, d_k)), strict=True)
    )
    chunk = reference.chunk_ids(rng.rand(n_past - n_sink) < 0.15, 8, 0)
    other = np.random.RandomState(seed + 1000)
    text = reference.TextInput(
        k * (1 + noise * other.standard_normal(k.shape)), v, q, np.arange(n), chunk, n_sink, n_window + n_probe, n_probe
    )
    return text, reference.output_errors(text, text_params(), TEXT_PARTS, n_pass=n_pass, n_window=n_window, n_skip=3)


TEXT_PARTS = (0.1, 0.25, 0.5)


def text_params() -> reference.PassParams:
    return reference.PassParams(
        scale=8**-0.5,
        softcap=0.0,
        inv_freq=0.5 ** np.arange(4),
        rope_neox=True,
        n_past=0,
        n_horizon=64,
        seed=7,
        budget=0,
    )


def steady_text(n_past: int, n_pass: int) -> tuple[reference.TextInput, np.ndarray]:
    """The first text whose errors a little noise does not move: no choice in it is close."""
    for seed in range(1000):
        text, errors = golden_text(n_past, n_pass, seed)
        if all(
            np.allclose(golden_text(n_past, n_pass, seed, noise)[1], errors, rtol=0.01) for noise in (2e-4, -2e-4, 5e-4)
        ):
            return text, errors
    raise RuntimeError("expected a text without close choices, got none in 1000; change its sizes")


def golden_frame(n: int, d_k: int, n_rot: int, neox: bool, n_q: int) -> list[float]:
    """Keys and queries of multiples of 1/64, of channels of all sizes, and their frame."""
    rng = np.random.RandomState(n)
    inv_freq = np.float32(10000.0 ** (-2 * np.arange(n_rot // 2) / max(1, n_rot))).astype(np.float64)
    offset, size = 8 * rng.standard_normal(d_k), np.exp(rng.standard_normal(d_k))
    k = np.round(64 * (offset + size * rng.standard_normal((n, d_k)))) / 64
    q = np.round(64 * np.exp(rng.standard_normal(d_k)) * rng.standard_normal((n_q, d_k))) / 64
    mean, scale = reference.key_frame(k, np.arange(n), q, inv_freq, neox, 0, 4096)
    return [float(x) for part in (inv_freq, k.ravel(), q.ravel(), mean, scale) for x in part]


def tables() -> str:
    """The small functions, one call a line, fields separated by spaces; floats have all their digits (float64).

    splitmix64 <x> <result>
    horizon <seed> <n_horizon> <pos> <u>
    delimiter <is_control> <number of bytes> <bytes...> <is_delimiter>
    chunks <n_chunk> <first_id> <number of tokens> <is_delimiter...> <ids...>
    budgets <ratio> <n_ctx> <n_sink> <n_chunk> <rows...>             of profile.txt
    equal <n_head> <ratio> <n_ctx> <n_sink> <n_chunk> <rows...>
    errors <n_sink> <n_past> <n_window> <n_probe> <n_pass> <n_skip> <n_horizon> <seed> <d_k> <d_v> <gqa>
           <number of parts> <parts...> <chunks...> <k...> <v...> <q...> <errors...>   neox RoPE of angles 1, 1/2, ...
    frame <number of keys> <d_k> <n_rot> <rope_neox> <number of queries> <inv_freq...> <k...> <q...>
          <mean...> <scale...>   keys at the positions from 0 on, of a context of 4096
    """
    lines = []

    def line(*fields):
        lines.append(
            " ".join(f.hex() if isinstance(f, bytes) else repr(f) if isinstance(f, float) else str(f) for f in fields)
        )

    for x in (0, 1, 1234567, 2**63, 2**64 - 1):
        line("splitmix64", x, reference.splitmix64(x))
    for seed, n_horizon, pos in ((0, 512, 0), (0, 512, 511), (42, 4096, 32768), (2**64 - 3, 1000, 3), (9, 1, 77)):
        line("horizon", seed, n_horizon, pos, *reference.horizon_positions([pos], n_horizon, seed).tolist())
    texts = (
        ".",
        "!",
        "?",
        ";",
        ":",
        ",",
        "\n",
        "{",
        "}",
        "\u3002",
        "\uff01",
        "\uff1f",
        "\uff1b",
        "\uff1a",
        "\uff0c",
        "\u3001",
        "\u2026",
        "\uff0e",
        " end.",
        ",  ",
        "\n ",
        "",
        "   ",
        "word",
        ".word",
        ")",
        "\t",
        "\r",
        "\r\n",
        "\u3000",
        "\u3002\u5b57",
    )
    for piece, control in [
        *((t.encode(), 0) for t in texts),
        (b"\x80\x82", 0),
        (b"\x82", 0),
        (b"<|im_end|>", 1),
        (b"", 1),
    ]:
        line("delimiter", control, len(piece), *piece, int(reference.delimiter_table([piece], [control])[0]))
    rng = np.random.RandomState(5)
    for n_chunk, first_id, n, p in (
        (32, 0, 100, 0.0),
        (32, 17, 120, 0.1),
        (4, 3, 12, 0.5),
        (1, 0, 3, 0.0),
        (32, 5, 0, 0.0),
    ):
        flags = (rng.rand(n) < p).astype(int)
        line("chunks", n_chunk, first_id, n, *flags.tolist(), *reference.chunk_ids(flags, n_chunk, first_id).tolist())
    profile = golden_profile()
    for ratio, n_ctx, n_sink, n_chunk in (
        (0.25, 8192, 4, 32),
        (0.1, 4096, 4, 32),
        (0.9, 1024, 4, 32),
        (0.25, 1023, 4, 32),
        (0.03125, 32768, 4, 32),
        (0.5, 512, 0, 32),
        (1.0, 100, 4, 32),
        (1.0, 20, 4, 32),
    ):
        line(
            "budgets",
            ratio,
            n_ctx,
            n_sink,
            n_chunk,
            *reference.budgets(profile, ratio, n_ctx, n_sink, n_chunk).tolist(),
        )
    for n_head, ratio, n_ctx, n_sink, n_chunk in ((7, 0.25, 1023, 4, 32), (3, 0.25, 8192, 4, 32), (2, 1.0, 20, 4, 32)):
        line(
            "equal",
            n_head,
            ratio,
            n_ctx,
            n_sink,
            n_chunk,
            *reference.equal_budgets(n_head, ratio, n_ctx, n_sink, n_chunk).tolist(),
        )
    for n, d_k, n_rot, neox, n_q in (
        (40, 64, 64, True, 12),
        (300, 32, 32, False, 50),
        (30, 32, 16, True, 9),
        (25, 64, 64, True, 0),
        (20, 32, 0, True, 8),
    ):
        line("frame", n, d_k, n_rot, int(neox), n_q, *golden_frame(n, d_k, n_rot, neox, n_q))
    for n_past, n_pass in ((42, 40), (78, 26)):
        text, errors = steady_text(n_past, n_pass)
        params = text_params()
        line(
            "errors",
            text.n_sink,
            n_past,
            text.n_exact - text.n_probe,
            text.n_probe,
            n_pass,
            3,
            params.n_horizon,
            params.seed,
            text.k.shape[1],
            text.v.shape[1],
            text.q.shape[1],
            len(TEXT_PARTS),
            *TEXT_PARTS,
            *text.chunk.tolist(),
            *text.k.ravel().tolist(),
            *text.v.ravel().tolist(),
            *text.q.ravel().tolist(),
            *errors.tolist(),
        )
    return "\n".join(lines) + "\n"


def golden_files() -> dict[str, bytes]:
    """Every file of this folder by name."""
    files = {f"{case.name}.bin": case_bytes(case) for case in CASES}
    files["index.txt"] = "".join(f"{case.name}\n" for case in CASES).encode()
    files["tables.txt"] = tables().encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.txt"
        reference.write_profile(path, golden_profile())
        files["profile.txt"] = path.read_bytes()
    return files


def main(folder: Path = GOLDEN) -> None:
    for name, data in golden_files().items():
        (folder / name).write_bytes(data)
        print(f"{len(data):8d} {name}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))

#include "sc-pass.h"

#include "sc-distinct.h"
#include "sc-evict.h"
#include "sc-quant.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace semcache {

namespace {

constexpr float EPS_WEIGHT = 1e-9f; // a row that no query looks at still takes part in its cluster's mean
constexpr float EPS_MASS = 1e-20f;
constexpr float BIAS_MIN = -6.0f;
constexpr float BIAS_MAX = 8.0f;
constexpr float RIDGE = 10.0f; // of the fitted values, see fit_values
constexpr float LEAST_KEPT =
    1e-3f; // share of a query's attention that a pass must leave for the query to take part in the fit
constexpr float PAD_LOGIT = -1e30f; // of the columns that only fill a panel
constexpr int32_t BLOCK =
    128 * 1024; // logits that are looked at together: enough to reuse a key panel, few enough for the L2 cache

// How the candidates' outcome is written in pass_workspace::winner.
constexpr int32_t DROPPED = -1;

struct counts {
    int32_t n_core, n_new, n_cand, n_rows, n_cols, n_query;

    counts(const head_rows & rows, const stage_rows & stage, const query_rows & queries, const head_shape & shape) {
        n_core = rows.n_used - rows.n_sink;
        n_new = stage.n_new;
        n_cand = n_core + n_new;
        n_rows = n_cand + rows.n_sink + stage.n_sink + stage.n_window;
        n_cols = (int32_t) pad_to(n_rows, NR);
        n_query = queries.n * shape.n_gqa;
    }
};

// Rows of logits in a block of them, MAX_BLOCK_ROWS at the most.
constexpr int32_t MAX_BLOCK_ROWS = 8 * MR;

int32_t block_rows(int32_t n_cols) {
    const int32_t fit = BLOCK / n_cols / MR * MR;
    return std::clamp(fit, MR, MAX_BLOCK_ROWS);
}

template <typename F> void for_rows(int32_t n, F && f) {
    for (int32_t i = 0; i < n; ++i) {
        f(i);
    }
}

// Logits before the bias of `n_q` queries: x[q, i] = scale q.k_i, capped.
void logits(const float * q, int32_t n_q, const float * panels, int32_t n_cols, const head_shape & shape, float * x) {
    const int32_t d = shape.n_embd_head_k;
    gemm_panels(q, d, n_q, panels, d, n_cols, x, n_cols);
    if (shape.softcap > 0.0f) {
        for (int64_t i = 0; i < (int64_t) n_q * n_cols; i += VL) {
            vstore(x + i, vsoftcap(vload(x + i), shape.softcap));
        }
    }
}

// Keys as f32 in candidate order: cores, new tokens, sinks of before, new sinks, window. Packed, with their biases.
void load_keys(
    const head_rows & rows, const stage_rows & stage, const head_shape & shape, const counts & c, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_k;
    float * k = ws.k.data();
    float * b = ws.bias.data();
    auto core = [&](int32_t i) {
        load_row(rows.k_type, rows.k + i * row_size(rows.k_type, d), k, d);
        k += d;
        *b++ = rows.bias[i];
    };
    auto token = [&](int32_t t) {
        f16_to_f32_row(stage.k + stage.cell[t] * stage.k_cell, k, d);
        k += d;
        *b++ = 0.0f;
    };
    for_rows(c.n_core, [&](int32_t i) { core(rows.n_sink + i); });
    for_rows(c.n_new, [&](int32_t i) { token(stage.n_sink + i); });
    for_rows(rows.n_sink, [&](int32_t i) { core(i); });
    for_rows(stage.n_sink, [&](int32_t i) { token(i); });
    for_rows(stage.n_window, [&](int32_t i) { token(stage.n_sink + c.n_new + i); });
    std::fill(b, ws.bias.data() + c.n_cols, PAD_LOGIT);
    pack_panels(ws.k.data(), d, c.n_rows, d, ws.panels.data());
}

// Every so many'th token has the queries that merged rows are fitted to.
int32_t fit_stride(const query_rows & queries) { return std::max(1, queries.n / N_FIT); }

// Query rows that merged rows are fitted to.
int32_t n_fit_query(const query_rows & queries, const head_shape & shape) {
    const int32_t stride = fit_stride(queries);
    return (queries.n + stride - 1) / stride * shape.n_gqa;
}

// Queries as f32, turned forward, with the scale of the logits in them; those of every stride'th token come first.
void load_queries(
    const query_rows & queries, const head_shape & shape, const rope & r, int32_t stride, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_k;
    const int64_t n_a = (int64_t) r.inv_freq.size();
    float * q = ws.q.data();
    auto load = [&](int32_t t) {
        load_query(queries, shape, t, q);
        for (int32_t g = 0; g < shape.n_gqa; ++g, q += d) {
            r.turn(q, queries.cs + t * n_a * 2);
            for (int32_t i = 0; i < d; ++i) {
                q[i] *= shape.scale;
            }
        }
    };
    for (int32_t t = 0; t < queries.n; t += stride) {
        load(t);
    }
    for_rows(queries.n, [&](int32_t t) {
        if (t % stride != 0) {
            load(t);
        }
    });
}

// Floats from one row of ws.v, ws.v_new and ws.r to the next: whole tiles, the rest is zero.
int64_t value_stride(const head_shape & shape) { return pad_to(shape.n_embd_head_v, NR); }

// Values as f32, in the order of the keys.
void load_values(
    const head_rows & rows, const stage_rows & stage, const head_shape & shape, const counts & c, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_v, ld = (int32_t) value_stride(shape);
    float * v = ws.v.data();
    auto end_row = [&] {
        std::fill(v + d, v + ld, 0.0f);
        v += ld;
    };
    auto core = [&](int32_t i) {
        load_row(rows.v_type, rows.v + i * row_size(rows.v_type, d), v, d);
        end_row();
    };
    auto token = [&](int32_t t) {
        load_value(stage, shape, t, v);
        end_row();
    };
    for_rows(c.n_core, [&](int32_t i) { core(rows.n_sink + i); });
    for_rows(c.n_new, [&](int32_t i) { token(stage.n_sink + i); });
    for_rows(rows.n_sink, [&](int32_t i) { core(i); });
    for_rows(stage.n_sink, [&](int32_t i) { token(i); });
    for_rows(stage.n_window, [&](int32_t i) { token(stage.n_sink + c.n_new + i); });
}

// s_dev: distance of each candidate's value from the mean value, in units of the mean distance.
void deviations(const head_shape & shape, const counts & c, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_v;
    const int64_t ld = value_stride(shape);
    const float inv = c.n_cand > 0 ? 1.0f / (float) c.n_cand : 0.0f;
    std::fill(ws.v_mean.begin(), ws.v_mean.begin() + d, 0.0f);
    for_rows(c.n_cand, [&](int32_t i) { axpy(inv, ws.v.data() + i * ld, ws.v_mean.data(), d); });
    double sum = 0.0;
    for_rows(c.n_cand, [&](int32_t i) {
        ws.s_dev[i] = std::sqrt(distance2(ws.v.data() + i * ld, ws.v_mean.data(), d));
        sum += ws.s_dev[i];
    });
    for_rows(c.n_cand, [&](int32_t i) { ws.s_dev[i] = sum > 0.0 ? ws.s_dev[i] * (float) (c.n_cand / sum) : 1.0f; });
}

// N rows of logits y [N, n_cols], which become attention shares before normalization: their part in the candidates'
// statistics, their log-sum-exps z [N], and what normalizes them, inv [N]. Several rows at a time, to touch the
// statistics less often.
template <int N> void add_queries(float * y, const counts & c, float * z, float * inv, pass_workspace & ws) {
    const float * bias = ws.bias.data();
    for (int r = 0; r < N; ++r) {
        float * x = y + (int64_t) r * c.n_cols;
        vf vmx = vset(PAD_LOGIT), vsm = {};
        for (int32_t i = 0; i < c.n_cols; i += VL) {
            const vf v = vload(x + i) + vload(bias + i);
            vstore(x + i, v);
            vmx = vmax(vmx, v);
        }
        const float mx = vmax_lanes(vmx);
        for (int32_t i = 0; i < c.n_cols; i += VL) {
            const vf p = vexp(vload(x + i) - mx);
            vstore(x + i, p);
            vsm += p;
        }
        const float sum = vsum(vsm);
        inv[r] = 1.0f / sum;
        z[r] = mx + std::log(sum);
    }
    float * s_use = ws.s_use.data();
    float * w = ws.w.data();
    for (int32_t i = 0; i < c.n_cols; i += VL) { // both are padded: what they gather past the candidates is never read
        vf u = vload(s_use + i), s = vload(w + i);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
            const vf p = vload(y + (int64_t) r * c.n_cols + i) * inv[r];
            u += (p * p) * (p * p);
            s += p;
        }
        vstore(s_use + i, u);
        vstore(w + i, s);
    }
}

// The stage's tokens take this pass's votes, and those of the candidates are from now on all that they have had.
void add_votes(const stage_rows & stage, const counts & c, int32_t n_sink_before, pass_workspace & ws) {
    auto add = [&](int32_t t, int32_t i) { // token and row, in the order of load_keys
        token_votes & v = stage.votes[stage.cell[t]];
        if (stage.n_voted[t] > 0) {
            ws.s_use[i] += v.p4;
            ws.w[i] += v.p;
        }
        v = { ws.s_use[i], ws.w[i] };
    };
    const int32_t sinks = c.n_cand + n_sink_before;
    for_rows(c.n_new, [&](int32_t i) { add(stage.n_sink + i, c.n_core + i); });
    for_rows(stage.n_sink, [&](int32_t i) { add(i, sinks + i); });
    for_rows(stage.n_window, [&](int32_t i) { add(stage.n_sink + c.n_new + i, sinks + stage.n_sink + i); });
}

// Marks the `budget` best candidates by their scores s [n_cand]: rank[i] = 1.
void choose_winners(const counts & c, int32_t budget, float * s, pass_workspace & ws) {
    std::iota(ws.order.begin(), ws.order.begin() + c.n_cand, 0);
    for_rows(c.n_cand, [&](int32_t i) { s[i] = std::isnan(s[i]) ? -INFINITY : s[i]; }); // NaN has no order to sort by
    std::nth_element(ws.order.begin(), ws.order.begin() + budget, ws.order.begin() + c.n_cand,
        [s](int32_t a, int32_t b) { return s[a] > s[b] || (s[a] == s[b] && a < b); });
    std::fill(ws.rank.begin(), ws.rank.begin() + c.n_cand, 0);
    for_rows(budget, [&](int32_t i) { ws.rank[ws.order[i]] = 1; });
}

// Scores of the semantic method, at ws.mk [n_cand]: infinite for the n_distinct keys least like the others, which
// nobody need have asked for yet.
void score_winners(const head_shape & shape, const counts & c, int32_t n_distinct, pass_workspace & ws) {
    key_differences(ws.k.data(), c.n_cand, c.n_cand, shape.n_embd_head_k, ws.k_mean.data(), ws.s_key.data());
    choose_winners(c, n_distinct, ws.s_key.data(), ws);
    for_rows(c.n_cand, [&](int32_t i) { ws.mk[i] = ws.rank[i] ? INFINITY : ws.meta[i].s_use * ws.s_dev[i]; });
}

// Scores of an eviction policy, at ws.mk [n_rows]. The stage's tokens keep theirs as votes.
void score_by_policy(const head_rows & rows, const stage_rows & stage, const query_rows & queries,
    const head_shape & shape, const counts & c, method how, pass_workspace & ws) {
    float *s_old = ws.s_use.data(), *score = ws.mk.data();
    int32_t row = 0;
    auto past = [&](float s) {
        s_old[row] = s;
        ws.order[row++] = -1;
    };
    auto tokens = [&](int32_t begin, int32_t end) {
        for (int32_t t = begin; t < end; ++t) {
            s_old[row] = stage.n_voted[t] > 0 ? stage.votes[stage.cell[t]].p : 0.0f;
            ws.order[row++] = t;
        }
    };
    const int32_t n_past = stage.n_sink + c.n_new;
    for_rows(c.n_core, [&](int32_t i) { past(rows.meta[rows.n_sink + i].s_use); });
    tokens(stage.n_sink, n_past);
    for_rows(rows.n_sink, [&](int32_t) { past(0.0f); });
    tokens(0, stage.n_sink);
    tokens(n_past, n_past + stage.n_window);

    evict_input x = {};
    x.n_cand = c.n_cand;
    x.n_row = c.n_rows;
    x.n_embd_head_k = shape.n_embd_head_k;
    x.k = ws.k.data();
    x.s_old = s_old;
    x.row_token = ws.order.data();
    x.n_voter = queries.n;
    x.n_gqa = shape.n_gqa;
    x.softcap = shape.softcap;
    x.q = ws.q.data();
    x.voter_token = queries.token;
    evict_scores(how, x, ws.x.data(), score);
    for_rows(c.n_rows, [&](int32_t i) {
        if (ws.order[i] >= 0) {
            stage.votes[stage.cell[ws.order[i]]].p = score[i];
        }
    });
    std::copy_n(score, c.n_cand, ws.s_use.data());
}

// Calls f(begin, end) for every run of candidates with one chunk id.
template <typename F> void for_chunks(const counts & c, const pass_workspace & ws, F && f) {
    for (int32_t i = 0, j; i < c.n_cand; i = j) {
        for (j = i + 1; j < c.n_cand && ws.meta[j].chunk == ws.meta[i].chunk; ++j) {
        }
        f(i, j);
    }
}

// winner[i]: i for a winner, the winner that a loser joins, or DROPPED. Nearest by (k_i - k_j)' M (k_i - k_j), the mean
// squared difference of the logits that the two would receive from the first n_query queries.
void assign_losers(const head_shape & shape, const counts & c, bool merge, int32_t n_query, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_k, ld = (int32_t) pad_to(d, NR); // the columns that fill a tile mean nothing
    if (merge) {
        gemm_cols(ws.q.data(), d, d, ws.q.data(), d, n_query, ld, ws.m.data(), ld);
        gemm_rows(ws.k.data(), d, c.n_cand, ws.m.data(), ld, d, ld, ws.mk.data(), ld, false);
    }
    for_chunks(c, ws, [&](int32_t begin, int32_t end) {
        int32_t n_win = 0;
        for (int32_t i = begin; i < end; ++i) {
            n_win += ws.rank[i];
            ws.winner[i] = ws.rank[i] ? i : DROPPED;
        }
        if (!merge || n_win == 0 || n_win == end - begin) {
            return;
        }
        for (int32_t i = begin; i < end; ++i) {
            float best = std::numeric_limits<float>::infinity();
            for (int32_t j = begin; j < end && !ws.rank[i]; ++j) {
                if (!ws.rank[j]) {
                    continue;
                }
                const float *ki = ws.k.data() + (int64_t) i * d, *kj = ws.k.data() + (int64_t) j * d;
                const float *mi = ws.mk.data() + (int64_t) i * ld, *mj = ws.mk.data() + (int64_t) j * ld;
                float dist = 0.0f;
                for (int32_t e = 0; e < d; ++e) {
                    dist += (ki[e] - kj[e]) * (mi[e] - mj[e]);
                }
                if (dist < best || ws.winner[i] == DROPPED) { // a NaN never wins, but a loser is not lost for it
                    best = dist;
                    ws.winner[i] = j;
                }
            }
        }
    });
}

// Weighted means of the clusters with at least two members, in order of their winners: ws.merged holds the winners,
// rank[winner] the index of its merged row; k_new, v_new and ws.meta[winner].n_tok are the result.
int32_t merge_clusters(const head_shape & shape, const counts & c, const float * weight, pass_workspace & ws) {
    std::fill(ws.count.begin(), ws.count.begin() + c.n_cand, 0);
    for_rows(c.n_cand, [&](int32_t i) {
        if (ws.winner[i] != DROPPED) {
            ++ws.count[ws.winner[i]];
        }
    });
    int32_t n_merged = 0;
    for_rows(c.n_cand, [&](int32_t i) {
        if (ws.winner[i] == i && ws.count[i] > 1) {
            ws.merged[n_merged] = i;
            ws.rank[i] = n_merged++;
        }
    });
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    const int64_t ld = value_stride(shape);
    std::fill(ws.k_new.begin(), ws.k_new.begin() + pad_to(n_merged, NR) * d_k, 0.0f);
    std::fill(ws.v_new.begin(), ws.v_new.begin() + n_merged * ld, 0.0f);
    std::fill(ws.bias_new.begin(), ws.bias_new.begin() + n_merged, 0.0f); // sum of weights for now
    for_rows(c.n_cand, [&](int32_t i) {
        const int32_t j = ws.winner[i];
        if (j == DROPPED || ws.count[j] < 2) {
            return;
        }
        const int32_t t = ws.rank[j];
        axpy(weight[i], ws.k.data() + (int64_t) i * d_k, ws.k_new.data() + (int64_t) t * d_k, d_k);
        axpy(weight[i], ws.v.data() + i * ld, ws.v_new.data() + t * ld, d_v);
        ws.bias_new[t] += weight[i];
        if (i != j) {
            ws.meta[j].n_tok = ws.meta[j].n_tok + ws.meta[i].n_tok;
        }
    });
    for_rows(n_merged, [&](int32_t t) {
        const float inv = 1.0f / ws.bias_new[t];
        for_rows(d_k, [&](int32_t e) { ws.k_new[(int64_t) t * d_k + e] *= inv; });
        for_rows(d_v, [&](int32_t e) { ws.v_new[t * ld + e] *= inv; });
    });
    return n_merged;
}

// The candidates that do not stay as they are: the members of clusters, cluster by cluster, then those dropped.
// ws.order[t] is the end of the t-th cluster. Their keys take the place of all rows' panels, since only what they
// change is looked at from here on. Returns their number.
int32_t gather_gone(const head_shape & shape, const counts & c, int32_t n_merged, pass_workspace & ws) {
    const int32_t d_k = shape.n_embd_head_k;
    const int64_t ld = value_stride(shape);
    int32_t n = 0;
    for_rows(n_merged, [&](int32_t t) {
        ws.order[t] = n;
        n += ws.count[ws.merged[t]];
    });
    for_rows(c.n_cand, [&](int32_t i) {
        const int32_t j = ws.winner[i];
        if (j == i && ws.count[i] == 1) {
            return;
        }
        const int32_t at = j == DROPPED ? n++ : ws.order[ws.rank[j]]++;
        std::copy_n(ws.k.data() + (int64_t) i * d_k, d_k, ws.mk.data() + (int64_t) at * d_k);
        std::copy_n(ws.v.data() + i * ld, ld, ws.v_gone.data() + at * ld);
        ws.bias_gone[at] = ws.bias[i];
    });
    pack_panels(ws.mk.data(), d_k, n, d_k, ws.panels.data());
    std::fill(ws.bias_gone.begin() + n, ws.bias_gone.begin() + pad_to(n, NR), PAD_LOGIT);
    return n;
}

// Fitted bias of the merged rows: on the average of the logs they receive the mass that their members received. Leaves
// of every query what the gone rows gave it: their part of the output in ws.r [n_query, d_v], their share in ws.s_gone.
void fit_bias(const head_shape & shape, int32_t n_gone, int32_t n_merged, int32_t n_query, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_k, ld = (int32_t) value_stride(shape);
    const int32_t n_cols = (int32_t) pad_to(n_merged, NR), ldx = (int32_t) pad_to(n_gone, NR);

    float * panels_new = ws.mk.data();
    pack_panels(ws.k_new.data(), d, n_merged, d, panels_new);

    std::fill(ws.bias_new.begin(), ws.bias_new.begin() + n_cols, 0.0f);
    const int32_t n_block = block_rows(ldx + n_cols);
    float * x = ws.x.data();
    float * y = x + (int64_t) n_block * ldx;
    float * mass = y + (int64_t) n_block * n_cols;
    std::fill(mass + n_merged, mass + n_cols, 0.0f);
    for (int32_t q0 = 0; q0 < n_query; q0 += n_block) {
        const int32_t n_q = std::min(n_block, n_query - q0);
        const float * q = ws.q.data() + (int64_t) q0 * d;
        logits(q, n_q, ws.panels.data(), ldx, shape, x);
        logits(q, n_q, panels_new, n_cols, shape, y);
        for_rows(n_q, [&](int32_t i) {
            const float z = ws.z[q0 + i];
            float * xi = x + (int64_t) i * ldx;
            vf sum = {};
            for (int32_t j = 0; j < ldx; j += VL) {
                const vf p = vexp(vload(xi + j) + vload(ws.bias_gone.data() + j) - z);
                vstore(xi + j, p);
                sum += p;
            }
            ws.s_gone[q0 + i] = vsum(sum);
            for (int32_t t = 0, m = 0; t < n_merged; ++t) {
                float in = 0.0f;
                for (; m < ws.order[t]; ++m) {
                    in += xi[m];
                }
                mass[t] = in;
            }
            const float * yi = y + (int64_t) i * n_cols;
            for (int32_t j = 0; j < n_cols; j += VL) {
                const vf lm = vlog(vmax(vload(mass + j), vset(EPS_MASS)));
                vstore(ws.bias_new.data() + j, vload(ws.bias_new.data() + j) + (lm - (vload(yi + j) - z)));
            }
        });
        gemm_rows(x, ldx, n_q, ws.v_gone.data(), ld, n_gone, ld, ws.r.data() + (int64_t) q0 * ld, ld, false);
    }
    for_rows(n_merged,
        [&](int32_t t) { ws.bias_new[t] = std::clamp(ws.bias_new[t] / (float) n_query, BIAS_MIN, BIAS_MAX); });
}

// Solves (A + ridge I) X = B for a symmetric, positive semidefinite A [n, n] (rows lda apart) by Cholesky's factors,
// which take the place of A's lower half; B [n, n_b] (rows ldb apart) becomes X.
void solve_ridge(float * a, int64_t lda, int32_t n, float ridge, float * b, int64_t ldb, int32_t n_b) {
    for (int32_t i = 0; i < n; ++i) {
        float * ai = a + i * lda;
        for (int32_t j = 0; j < i; ++j) {
            const float * aj = a + j * lda;
            ai[j] = (ai[j] - dot(ai, aj, j)) / aj[j];
        }
        ai[i] = std::sqrt(
            std::max(ai[i] - dot(ai, ai, i), 0.0f) + ridge); // in exact arithmetic the first part is not negative
        for (int32_t j = 0; j < i; ++j) {
            axpy(-ai[j], b + j * ldb, b + i * ldb, n_b);
        }
        for_rows(n_b, [&](int32_t e) { b[i * ldb + e] /= ai[i]; });
    }
    for (int32_t i = n; i-- > 0;) {
        const float * ai = a + i * lda;
        for_rows(n_b, [&](int32_t e) { b[i * ldb + e] /= ai[i]; });
        for (int32_t j = 0; j < i; ++j) {
            axpy(-ai[j], b + i * ldb, b + j * ldb, n_b);
        }
    }
}

// Moves the merged values so that the queries' outputs come out as before the pass: least squares over the queries,
// with a ridge as large as the outputs' mean squared residual asks for in comparison with the values' scatter about
// their means.
void fit_values(const head_shape & shape, int32_t n_merged, int32_t n_query, pass_workspace & ws) {
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    const int32_t n_cols = (int32_t) pad_to(n_merged, NR), ld = (int32_t) value_stride(shape);

    double scatter = 0.0;
    int32_t n_member = 0;
    for_rows(n_merged, [&](int32_t t) {
        for (; n_member < ws.order[t]; ++n_member) {
            scatter += distance2(ws.v_gone.data() + (int64_t) n_member * ld, ws.v_new.data() + (int64_t) t * ld, d_v);
        }
    });
    scatter /= n_member;
    std::fill(ws.bias_new.begin() + n_merged, ws.bias_new.begin() + n_cols, PAD_LOGIT);

    // The equations: shares of the merged rows [n_query, n_merged], with their sign changed, and what is missing r
    // [n_query, d_v]. Without the gone rows and with the merged ones the shares sum up to 1/inv instead of 1, so the
    // rows that stay now give inv (output - gone part), and the output lacks output - inv (output - gone part + merged
    // part).
    const int32_t n_block = block_rows(n_cols);
    double missing = 0.0;
    for (int32_t q0 = 0; q0 < n_query; q0 += n_block) {
        const int32_t n_q = std::min(n_block, n_query - q0);
        float *r = ws.r.data() + (int64_t) q0 * ld, *y = ws.shares.data() + (int64_t) q0 * n_cols;
        logits(ws.q.data() + (int64_t) q0 * d_k, n_q, ws.mk.data(), n_cols, shape,
            y); // panels of the merged keys, see fit_bias
        for_rows(n_q, [&](int32_t i) {
            const float z = ws.z[q0 + i];
            float *yi = y + (int64_t) i * n_cols, *ri = r + (int64_t) i * ld;
            vf sum = {};
            for (int32_t j = 0; j < n_cols; j += VL) {
                const vf p = vexp(vload(yi + j) + vload(ws.bias_new.data() + j) - z);
                vstore(yi + j, p);
                sum += p;
            }
            const float kept = 1.0f - ws.s_gone[q0 + i] + vsum(sum);
            if (kept < LEAST_KEPT) { // rounding noise; nothing that stays could answer this query
                std::fill(yi, yi + n_cols, 0.0f);
                std::fill(ri, ri + ld, 0.0f);
                return;
            }
            const float inv = 1.0f / kept;
            const float * out = ws.out.data() + (int64_t) (q0 + i) * ld;
            for (int32_t j = 0; j < n_cols; j += VL) {
                vstore(yi + j, vload(yi + j) * -inv);
            }
            for_rows(ld, [&](int32_t e) { ri[e] = (1.0f - inv) * out[e] + inv * ri[e]; });
        });
        gemm_rows(y, n_cols, n_q, ws.v_new.data(), ld, n_merged, ld, r, ld, true);
        for_rows(n_q, [&](int32_t i) { missing += dot(r + (int64_t) i * ld, r + (int64_t) i * ld, d_v); });
    }
    missing /= n_query;
    const float ridge = (float) (RIDGE * missing / scatter);
    if (!(ridge > 0.0f) || !std::isfinite(ridge)) {
        return; // nothing is missing, or the members are all alike
    }
    gemm_cols(ws.shares.data(), n_cols, n_merged, ws.shares.data(), n_cols, n_query, n_cols, ws.normal.data(), n_cols);
    gemm_cols(ws.shares.data(), n_cols, n_merged, ws.r.data(), ld, n_query, ld, ws.move.data(), ld);
    solve_ridge(ws.normal.data(), n_cols, n_merged, ridge, ws.move.data(), ld, d_v);
    for_rows(n_merged,
        [&](int32_t t) { axpy(-1.0f, ws.move.data() + (int64_t) t * ld, ws.v_new.data() + (int64_t) t * ld, d_v); });
}

// Greedy clusters of candidates [begin, end) in reading order: a row joins the first seed whose key is at least `tau`
// close by cosine. Returns the number of clusters.
int32_t greedy_clusters(int32_t begin, int32_t end, int32_t d, float tau, pass_workspace & ws) {
    int32_t n = 0;
    for (int32_t i = begin; i < end; ++i) {
        ws.winner[i] = DROPPED;
    }
    for (int32_t i = begin; i < end; ++i) {
        if (ws.winner[i] != DROPPED) {
            continue;
        }
        ws.winner[i] = i;
        ++n;
        for (int32_t j = i + 1; j < end; ++j) {
            // not >=, so that a NaN joins: every chunk must be able to become one cluster
            if (ws.winner[j] == DROPPED &&
                !(dot(ws.k.data() + (int64_t) i * d, ws.k.data() + (int64_t) j * d, d) < tau * ws.w[i] * ws.w[j])) {
                ws.winner[j] = i;
            }
        }
    }
    return n;
}

// The paper's clustering: every chunk gets its share of an equal budget and the cosine threshold that meets it; whole
// chunks go, oldest first, when there are more chunks than rows.
void cluster_paper(const head_shape & shape, const counts & c, int32_t budget, pass_workspace & ws) {
    const int32_t d = shape.n_embd_head_k;
    int64_t n_tok = 0;
    for_rows(c.n_cand, [&](int32_t i) {
        n_tok += ws.meta[i].n_tok;
        const float norm = std::sqrt(dot(ws.k.data() + (int64_t) i * d, ws.k.data() + (int64_t) i * d, d));
        ws.w[i] = norm > 0.0f ? norm : 1.0f; // a key of zero has cosine 0 with every other
    });
    auto share = [&](int32_t begin, int32_t end) {
        int64_t n = 0;
        for (int32_t i = begin; i < end; ++i) {
            n += ws.meta[i].n_tok;
        }
        return (int32_t) std::max<int64_t>(1, n * budget / n_tok);
    };
    int64_t total = 0;
    for_chunks(c, ws, [&](int32_t begin, int32_t end) { total += share(begin, end); });
    for_chunks(c, ws, [&](int32_t begin, int32_t end) {
        const int32_t b = share(begin, end);
        if (total > budget) {
            total -= b;
            std::fill(ws.winner.begin() + begin, ws.winner.begin() + end, DROPPED);
            return;
        }
        float lo = -1.001f, hi = 1.001f;
        if (end - begin <= b) {
            lo = 2.0f;
        } else {
            for (int step = 0; step < 20; ++step) {
                const float mid = 0.5f * (lo + hi);
                (greedy_clusters(begin, end, d, mid, ws) > b ? hi : lo) = mid;
            }
        }
        greedy_clusters(begin, end, d, lo, ws);
    });
}

// k and v are scratch afterwards.
void put_core(head_rows & rows, int32_t dst, const head_shape & shape, float * k, float * v) {
    store_row(rows.k_type, k, rows.k + dst * row_size(rows.k_type, shape.n_embd_head_k), shape.n_embd_head_k);
    store_row(rows.v_type, v, rows.v + dst * row_size(rows.v_type, shape.n_embd_head_v), shape.n_embd_head_v);
}

// Writes sinks and winners to their places, in text order. A row's place is never behind the row itself, so going
// forward overwrites only what was read.
pass_result compact(
    head_rows & rows, const stage_rows & stage, const head_shape & shape, const counts & c, pass_workspace & ws) {
    pass_result res;
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    const int64_t ld = value_stride(shape);
    if (stage.n_sink > 0) {
        for_rows(stage.n_sink, [&](int32_t i) {
            const int32_t key = c.n_cand + rows.n_sink + i;
            put_core(rows, i, shape, ws.k.data() + (int64_t) key * d_k, ws.v.data() + key * ld);
            rows.bias[i] = 0.0f;
            rows.meta[i] = {};
        });
        rows.n_sink = stage.n_sink;
    }
    int32_t dst = rows.n_sink;
    for_rows(c.n_cand, [&](int32_t i) {
        if (ws.winner[i] != i) {
            ++(ws.winner[i] == DROPPED ? res.n_dropped : res.n_merged);
            return;
        }
        const bool merged = ws.count[i] > 1;
        if (merged) {
            const int32_t t = ws.rank[i];
            put_core(rows, dst, shape, ws.k_new.data() + (int64_t) t * d_k, ws.v_new.data() + t * ld);
            rows.bias[dst] = ws.bias_new[t];
        } else if (i >= c.n_core) {
            put_core(rows, dst, shape, ws.k.data() + (int64_t) i * d_k, ws.v.data() + i * ld);
            rows.bias[dst] = 0.0f;
        } else if (const int32_t src = rows.n_sink + i; src != dst) {
            const int64_t size_k = row_size(rows.k_type, d_k), size_v = row_size(rows.v_type, d_v);
            std::copy_n(rows.k + src * size_k, size_k, rows.k + dst * size_k);
            std::copy_n(rows.v + src * size_v, size_v, rows.v + dst * size_v);
            rows.bias[dst] = rows.bias[src];
        }
        rows.meta[dst++] = ws.meta[i];
    });
    rows.n_used = dst;
    return res;
}

} // namespace

void load_query(const query_rows & queries, const head_shape & shape, int32_t t, float * q) {
    const int32_t n = shape.n_gqa * shape.n_embd_head_k;
    const int64_t row = queries.row[t];
    if (queries.q8) {
        q8_0_to_f32_row(queries.q8 + row * queries.q8_row, queries.q8_first, q, n);
    } else {
        f16_to_f32_row(queries.q + row * queries.q_row, q, n);
    }
}

void load_value(const stage_rows & stage, const head_shape & shape, int32_t t, float * v) {
    const f16 * x = stage.v + stage.cell[t] * stage.v_cell;
    for_rows(shape.n_embd_head_v, [&](int32_t e) { v[e] = f16_to_f32(x[e * stage.v_elem]); });
}

void pass_workspace::reserve(const head_shape & shape, int32_t n_rows, int32_t n_loser, int32_t n_query) {
    auto grow = [](auto & v, int64_t n) {
        if ((int64_t) v.size() < n) {
            v.resize(n);
        }
    };
    const int64_t n = pad_to(n_rows, NR);
    const int64_t dk = shape.n_embd_head_k, ldm = pad_to(dk, NR), ld = value_stride(shape);
    const int64_t n_fit = (int64_t) std::min(n_query, 2 * N_FIT) * shape.n_gqa;
    const int64_t n_merged =
        pad_to(std::min(n_rows / 2, n_loser), NR); // a merged row has two members at least, one of them a loser
    grow(k, n * dk);
    grow(panels, n * dk);
    grow(v, n * ld);
    grow(q, (int64_t) n_query * shape.n_gqa * dk + NR);           // a tile may end behind the last row
    grow(x, std::max<int64_t>(BLOCK, MR * (2 * n + 2 * NR)) + n); // see block_rows
    grow(mk, n * ldm);
    grow(k_new, pad_to(n_rows / 2, NR) * dk);
    grow(v_new, pad_to(n_rows / 2, NR) * ld);
    grow(move, n_merged * ld);
    grow(normal, n_merged * n_merged);
    grow(shares, n_merged * n_fit);
    grow(r, n_fit * ld);
    grow(out, n_fit * ld);
    grow(v_gone, n * ld);
    grow(s_gone, n_fit);
    grow(m, dk * ldm);
    grow(k_mean, dk);
    grow(v_mean, ld);
    grow(z, (int64_t) n_query * shape.n_gqa);
    for (auto * v : { &bias, &s_use, &s_dev, &s_key, &w, &bias_new, &bias_gone }) {
        grow(*v, n);
    }
    for (auto * v : { &order, &rank, &winner, &merged, &count }) {
        grow(*v, n);
    }
    grow(meta, n);
}

int32_t score_head(const head_rows & rows, const stage_rows & stage, const query_rows & queries,
    const head_shape & shape, const rope & r, bool outputs, pass_workspace & ws) {
    const counts c(rows, stage, queries, shape);
    load_keys(rows, stage, shape, c, ws);
    load_values(rows, stage, shape, c, ws);
    load_queries(queries, shape, r, fit_stride(queries), ws);
    for (auto * v : { &ws.s_use, &ws.w }) {
        std::fill(v->begin(), v->begin() + c.n_cols, 0.0f);
    }
    const int32_t n_block = block_rows(c.n_cols), n_out = outputs ? n_fit_query(queries, shape) : 0;
    const int64_t ld = value_stride(shape);
    float inv[MAX_BLOCK_ROWS];
    for (int32_t q0 = 0, n_q; q0 < c.n_query; q0 += n_q) {
        n_q = std::min(n_block, (q0 < n_out ? n_out : c.n_query) - q0);
        float * x = ws.x.data();
        logits(ws.q.data() + (int64_t) q0 * shape.n_embd_head_k, n_q, ws.panels.data(), c.n_cols, shape, x);
        int32_t i = 0;
        for (; i + 4 <= n_q; i += 4) {
            add_queries<4>(x + (int64_t) i * c.n_cols, c, ws.z.data() + q0 + i, inv + i, ws);
        }
        for (; i < n_q; ++i) {
            add_queries<1>(x + (int64_t) i * c.n_cols, c, ws.z.data() + q0 + i, inv + i, ws);
        }
        if (q0 < n_out) {
            float * out = ws.out.data() + q0 * ld;
            gemm_rows(x, c.n_cols, n_q, ws.v.data(), ld, c.n_rows, (int) ld, out, ld, false);
            for_rows(n_q, [&](int32_t r) { for_rows((int32_t) ld, [&](int32_t e) { out[r * ld + e] *= inv[r]; }); });
        }
    }
    add_votes(stage, c, rows.n_sink, ws);
    for_rows(c.n_cand, [&](int32_t i) {
        const bool is_core = i < c.n_core;
        const int32_t n_before = is_core ? 0 : stage.n_voted[stage.n_sink + i - c.n_core];
        const int32_t n_asked = std::max(c.n_query + n_before * shape.n_gqa, 1);
        // the fewer ask, the greater is the power mean if one of them looked, and a core's best score stays
        const int32_t n_mean = is_core ? std::max(n_asked, queries.n_full * shape.n_gqa) : n_asked;
        ws.s_use[i] = std::sqrt(std::sqrt(ws.s_use[i] * (1.0f / (float) n_mean)));
        ws.w[i] *= 1.0f / (float) n_asked;
    });
    deviations(shape, c, ws);
    return c.n_cand;
}

static void score_candidates(const head_rows & rows, const stage_rows & stage, const query_rows & queries,
    const head_shape & shape, const rope & r, const counts & c, method how, bool outputs, pass_workspace & ws) {
    if (how == method::semantic) {
        score_head(rows, stage, queries, shape, r, outputs, ws);
    } else {
        load_keys(rows, stage, shape, c, ws);
        load_values(rows, stage, shape, c, ws);
        if (evicts(how)) {
            load_queries(queries, shape, r, 1, ws);
            score_by_policy(rows, stage, queries, shape, c, how, ws);
        } else {
            std::fill(ws.s_use.begin(), ws.s_use.begin() + c.n_cand, 0.0f);
        }
    }
    for_rows(c.n_cand, [&](int32_t i) {
        if (i < c.n_core) {
            const core_meta & old = rows.meta[rows.n_sink + i];
            ws.meta[i] = old;
            ws.meta[i].s_use = evicts(how) ? ws.s_use[i] : std::max(old.s_use, ws.s_use[i]);
        } else {
            ws.meta[i] = { ws.s_use[i], (uint32_t) stage.chunk[i - c.n_core], 1 };
        }
    });
}

// Who of more than `budget` candidates stays, who joins whom and who goes (ws.winner), and what each weighs in a merge
// (ws.w).
static void choose(const stage_rows & stage, const query_rows & queries, const head_shape & shape, const counts & c,
    const pass_params & params, int32_t budget, pass_workspace & ws) {
    switch (params.how) {
        case method::semantic: {
            score_winners(shape, c, (int32_t) ((int64_t) budget * params.distinct / 100), ws);
            choose_winners(c, budget, ws.mk.data(), ws);
            assign_losers(shape, c, params.merge, n_fit_query(queries, shape), ws);
            for_rows(c.n_cand, [&](int32_t i) { ws.w[i] += EPS_WEIGHT; });
        } break;
        case method::paper: {
            cluster_paper(shape, c, budget, ws);
            for_rows(c.n_cand, [&](int32_t i) { ws.w[i] = (float) ws.meta[i].n_tok; });
        } break;
        case method::streaming: {
            for_rows(c.n_cand, [&](int32_t i) { ws.winner[i] = i >= c.n_cand - budget ? i : DROPPED; });
        } break;
        default: {
            const int32_t n_new = newest_kept(params.how, budget, stage.n_window);
            std::fill_n(ws.mk.begin() + c.n_cand - n_new, n_new, INFINITY);
            choose_winners(c, budget, ws.mk.data(), ws);
            for_rows(c.n_cand, [&](int32_t i) { ws.winner[i] = ws.rank[i] ? i : DROPPED; });
        } break;
    }
}

pass_result compress_head(head_rows & rows, const stage_rows & stage, const query_rows & queries,
    const head_shape & shape, const rope & r, const pass_params & params, pass_workspace & ws) {
    const counts c(rows, stage, queries, shape);
    const int32_t budget = rows.n_alloc - rows.n_sink - stage.n_sink;
    score_candidates(rows, stage, queries, shape, r, c, params.how, params.merge && c.n_cand > budget, ws);
    if (c.n_cand <= budget) {
        std::iota(ws.winner.begin(), ws.winner.begin() + c.n_cand, 0);
        std::fill(ws.count.begin(), ws.count.begin() + c.n_cand, 1);
        return compact(rows, stage, shape, c, ws);
    }
    choose(stage, queries, shape, c, params, budget, ws);
    const int32_t n_merged = merge_clusters(shape, c, ws.w.data(), ws);
    if (n_merged > 0 && params.how == method::semantic && c.n_query > 0) {
        const int32_t n_gone = gather_gone(shape, c, n_merged, ws), n_query = n_fit_query(queries, shape);
        fit_bias(shape, n_gone, n_merged, n_query, ws);
        fit_values(shape, n_merged, n_query, ws);
    } else {
        for_rows(n_merged, [&](int32_t t) { ws.bias_new[t] = std::log((float) ws.meta[ws.merged[t]].n_tok); });
    }
    return compact(rows, stage, shape, c, ws);
}

} // namespace semcache

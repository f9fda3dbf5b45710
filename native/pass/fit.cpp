#include "fit.h"

#include "logits.h"

#include <cmath>

namespace semcache {

fit_scratch::fit_scratch(arena & a, const head_shape & shape, const pass_sizes & n) {
    const int64_t n_cols = pad_to(n.n_rows, MAX_NR), ld = value_stride(shape), d = shape.n_embd_head_k;
    const int64_t n_fit = std::min(n.n_voter * shape.n_gqa, N_FIT + shape.n_gqa);
    // a merged row has two members at least, one of them a loser
    const int64_t n_merged = pad_to(std::min(n.n_rows / 2, n.n_loser), MAX_NR);
    end = a.take<int32_t>(n_merged);
    gone = a.take<int32_t>(n_cols);
    panels = a.take<float>(n_cols * d);
    v = a.take<float>(n_cols * ld);
    bias = a.take<float>(n_cols);
    panels_new = a.take<float>(n_merged * d);
    x = a.take<float>(std::max<int64_t>(BLOCK, MAX_MR * (n_cols + n_merged)));
    mass = a.take<float>(n_merged);
    share = a.take<float>(n_fit);
    r = a.take<float>(n_fit * ld);
    shares = a.take<float>(n_fit * n_merged);
    normal = a.take<float>(n_merged * n_merged);
    move = a.take<float>(n_merged * ld);
}

namespace {

constexpr float EPS_MASS = 1e-20f;
constexpr float BIAS_MIN = -6.0f;
constexpr float BIAS_MAX = 8.0f;
constexpr float RIDGE = 10.0f;
constexpr float LEAST_KEPT = 1e-3f; // share of its attention that a pass must leave for a query to take part

// Returns the number of gone rows.
int32_t gather_gone(
    const pass_head & h, const pass_rows & x, const pass_choice & c, const pass_merged & m, fit_scratch & t) {
    const int32_t d = h.a.shape.n_embd_head_k;
    const int64_t ld = value_stride(h.a.shape);
    int32_t n = 0;
    for_rows(m.n, [&](int32_t i) {
        t.end[i] = n;
        n += m.count[m.first[i]];
    });
    for_rows(h.n_cand, [&](int32_t i) {
        const int32_t j = c.winner[i];
        if (j == i && m.count[i] == 1) {
            return;
        }
        t.gone[j == DROPPED ? n++ : t.end[m.place[j]]++] = i;
    });
    for_rows(n, [&](int32_t at) {
        const int32_t i = t.gone[at];
        std::copy_n(x.v + i * ld, ld, t.v + at * ld);
        t.bias[at] = i < h.n_core ? h.bias(h.plan.n_row_sink + i) : 0.0f;
    });
    pack_panels([&](int32_t at) { return x.k + (int64_t) t.gone[at] * d; }, n, d, t.panels);
    std::fill(t.bias + n, t.bias + pad_to(n, NR), PAD_LOGIT);
    return n;
}

void fit_bias(
    const pass_head & h, const pass_rows & x, const pass_scores & s, int32_t n_gone, pass_merged & m, fit_scratch & t) {
    const head_shape & shape = h.a.shape;
    const int32_t d = shape.n_embd_head_k, ld = (int32_t) value_stride(shape), n_query = n_fit_query(h);
    const int32_t n_cols = (int32_t) pad_to(m.n, NR), ldx = (int32_t) pad_to(n_gone, NR);
    pack_panels(m.k, d, m.n, d, t.panels_new);
    std::fill_n(m.bias, n_cols, 0.0f);
    std::fill(t.mass + m.n, t.mass + n_cols, 0.0f);
    const int32_t n_block = block_rows(ldx + n_cols);
    float *xs = t.x, *ys = t.x + (int64_t) n_block * ldx;
    for (int32_t q0 = 0; q0 < n_query; q0 += n_block) {
        const int32_t n_q = std::min(n_block, n_query - q0);
        const float * q = x.q + (int64_t) q0 * d;
        logits(q, n_q, t.panels, ldx, shape, xs);
        logits(q, n_q, t.panels_new, n_cols, shape, ys);
        for_rows(n_q, [&](int32_t i) {
            const float z = s.z[q0 + i];
            float * xi = xs + (int64_t) i * ldx;
            t.share[q0 + i] = exp_row(xi, t.bias, z, ldx);
            for (int32_t j = 0, member = 0; j < m.n; ++j) {
                float in = 0.0f;
                for (; member < t.end[j]; ++member) {
                    in += xi[member];
                }
                t.mass[j] = in;
            }
            const float * yi = ys + (int64_t) i * n_cols;
            for (int32_t j = 0; j < n_cols; j += VL) {
                const vf log_mass = vlog(vmax(vload(t.mass + j), vset(EPS_MASS)));
                vstore(m.bias + j, vload(m.bias + j) + (log_mass - (vload(yi + j) - z)));
            }
        });
        gemm_rows(xs, ldx, n_q, t.v, ld, n_gone, ld, t.r + (int64_t) q0 * ld, ld, false);
    }
    for_rows(m.n, [&](int32_t j) { m.bias[j] = std::clamp(m.bias[j] / (float) n_query, BIAS_MIN, BIAS_MAX); });
    std::fill(m.bias + m.n, m.bias + n_cols, PAD_LOGIT);
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
        // in exact arithmetic the first part is not negative
        ai[i] = std::sqrt(std::max(ai[i] - dot(ai, ai, i), 0.0f) + ridge);
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

// Mean squared distance of the members' values from their cluster's mean.
double scatter_of(const head_shape & shape, const pass_merged & m, const fit_scratch & t) {
    const int64_t ld = value_stride(shape);
    double sum = 0.0;
    int32_t member = 0;
    for_rows(m.n, [&](int32_t j) {
        for (; member < t.end[j]; ++member) {
            sum += distance2(t.v + member * ld, m.v + j * ld, shape.n_embd_head_v);
        }
    });
    return sum / member;
}

// The equations, t.shares and t.r; returns the mean square of what an output lacks. Without the gone rows and with the
// merged ones a query's shares sum up to 1/inv instead of 1, so the rows that stay now give inv (output - gone part),
// and the output lacks output - inv (output - gone part + merged part), whose (1 - inv) output is that of the mean
// output: each query's own would be a product of all rows' values.
double equations(
    const pass_head & h, const pass_rows & x, const pass_scores & s, const pass_merged & m, fit_scratch & t) {
    const head_shape & shape = h.a.shape;
    const int32_t n_cols = (int32_t) pad_to(m.n, NR), ld = (int32_t) value_stride(shape), n_query = n_fit_query(h);
    const int32_t n_block = block_rows(n_cols);
    double missing = 0.0;
    for (int32_t q0 = 0; q0 < n_query; q0 += n_block) {
        const int32_t n_q = std::min(n_block, n_query - q0);
        float *r = t.r + (int64_t) q0 * ld, *y = t.shares + (int64_t) q0 * n_cols;
        logits(x.q + (int64_t) q0 * shape.n_embd_head_k, n_q, t.panels_new, n_cols, shape, y);
        for_rows(n_q, [&](int32_t i) {
            float *yi = y + (int64_t) i * n_cols, *ri = r + (int64_t) i * ld;
            const float kept = 1.0f - t.share[q0 + i] + exp_row(yi, m.bias, s.z[q0 + i], n_cols);
            if (kept < LEAST_KEPT) { // rounding noise; nothing that stays could answer this query
                std::fill_n(yi, n_cols, 0.0f);
                std::fill_n(ri, ld, 0.0f);
                return;
            }
            const float inv = 1.0f / kept;
            for (int32_t j = 0; j < n_cols; j += VL) {
                vstore(yi + j, vload(yi + j) * -inv);
            }
            for_rows(ld, [&](int32_t e) { ri[e] = (1.0f - inv) * s.out[e] + inv * ri[e]; });
        });
        gemm_rows(y, n_cols, n_q, m.v, ld, m.n, ld, r, ld, true);
        for_rows(
            n_q, [&](int32_t i) { missing += dot(r + (int64_t) i * ld, r + (int64_t) i * ld, shape.n_embd_head_v); });
    }
    return missing / n_query;
}

void fit_values(const pass_head & h, const pass_rows & x, const pass_scores & s, pass_merged & m, fit_scratch & t) {
    const int32_t n_cols = (int32_t) pad_to(m.n, NR), n_query = n_fit_query(h), d_v = h.a.shape.n_embd_head_v;
    const int32_t ld = (int32_t) value_stride(h.a.shape);
    const double scatter = scatter_of(h.a.shape, m, t), missing = equations(h, x, s, m, t);
    const float ridge = (float) (RIDGE * missing / scatter);
    if (!(ridge > 0.0f) || !std::isfinite(ridge)) {
        return; // nothing is missing, or the members are all alike
    }
    gemm_cols(t.shares, n_cols, m.n, t.shares, n_cols, n_query, n_cols, t.normal, n_cols);
    gemm_cols(t.shares, n_cols, m.n, t.r, ld, n_query, ld, t.move, ld);
    solve_ridge(t.normal, n_cols, m.n, ridge, t.move, ld, d_v);
    for_rows(m.n, [&](int32_t j) { axpy(-1.0f, t.move + (int64_t) j * ld, m.v + (int64_t) j * ld, d_v); });
}

} // namespace

void fit(const pass_head & h, const pass_rows & x, const pass_scores & s, const pass_choice & c, pass_merged & m,
    fit_scratch & t) {
    const int32_t n_gone = gather_gone(h, x, c, m, t);
    fit_bias(h, x, s, n_gone, m, t);
    fit_values(h, x, s, m, t);
}

} // namespace semcache

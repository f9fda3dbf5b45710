#include "score.h"

#include "logits.h"

namespace semcache {

pass_scores::pass_scores(arena & a, const head_shape & shape, const pass_sizes & n) {
    const int64_t n_cols = pad_to(n.n_rows, MAX_NR);
    s_use = a.take<float>(n_cols);
    w = a.take<float>(n_cols);
    s_dev = a.take<float>(n_cols);
    z = a.take<float>((int64_t) n.n_voter * shape.n_gqa);
    out = a.take<float>(value_stride(shape));
}

score_scratch::score_scratch(arena & a, const head_shape & shape, const pass_sizes & n) {
    const int64_t n_cols = pad_to(n.n_rows, MAX_NR);
    panels = a.take<float>(n_cols * shape.n_embd_head_k);
    bias = a.take<float>(n_cols);
    x = a.take<float>(std::max<int64_t>(BLOCK, MAX_MR * n_cols));
    v_mean = a.take<float>(shape.n_embd_head_v);
}

namespace {

void pack_keys(const pass_head & h, const pass_rows & x, score_scratch & t) {
    float * b = t.bias;
    h.for_all_rows([&](int32_t i) { *b++ = h.bias(i); }, [&](int32_t) { *b++ = 0.0f; });
    std::fill(b, t.bias + h.n_cols, PAD_LOGIT);
    const int32_t d = h.a.shape.n_embd_head_k;
    pack_panels(x.k, d, h.n_rows, d, t.panels);
}

// N rows of logits y [N, n_cols], of which nothing is left: their part in the candidates' sums, and their log-sum-exps
// z [N]. Several rows at a time, to touch the sums less often.
template <int N> void add_queries(float * y, const float * bias, int32_t n_cols, float * z, pass_scores & s) {
    float inv[N];
    for (int r = 0; r < N; ++r) {
        float * x = y + (int64_t) r * n_cols;
        vf vmx = vset(PAD_LOGIT), vsm = {};
        for (int32_t i = 0; i < n_cols; i += VL) {
            const vf v = vload(x + i) + vload(bias + i);
            vstore(x + i, v);
            vmx = vmax(vmx, v);
        }
        const float mx = vmax_lanes(vmx);
        for (int32_t i = 0; i < n_cols; i += VL) {
            const vf p = vexp(vload(x + i) - mx);
            vstore(x + i, p);
            vsm += p;
        }
        const float sum = vsum(vsm);
        inv[r] = 1.0f / sum;
        z[r] = mx + std::log(sum);
    }
    for (int32_t i = 0; i < n_cols; i += VL) { // both are padded: what they gather past the candidates is never read
        vf u = vload(s.s_use + i), w = vload(s.w + i);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
            const vf p = vload(y + (int64_t) r * n_cols + i) * inv[r];
            u += (p * p) * (p * p);
            w += p;
        }
        vstore(s.s_use + i, u);
        vstore(s.w + i, w);
    }
}

// The mean output of n queries whose shares add up to w.
void mean_output(const pass_head & h, const pass_rows & x, int32_t n, pass_scores & s) {
    const int64_t ld = value_stride(h.a.shape);
    std::fill_n(s.out, ld, 0.0f);
    for_rows(h.n_rows, [&](int32_t i) { axpy(s.w[i] / (float) n, x.v + i * ld, s.out, (int) ld); });
}

// Sums over all queries: of the shares to the power of 4 in s_use, of the shares in w.
void sum_shares(const pass_head & h, const pass_rows & x, bool outputs, pass_scores & s, score_scratch & t) {
    const head_shape & shape = h.a.shape;
    const int32_t n_block = block_rows(h.n_cols), n_out = outputs ? n_fit_query(h) : 0;
    std::fill_n(s.s_use, h.n_cols, 0.0f);
    std::fill_n(s.w, h.n_cols, 0.0f);
    for (int32_t q0 = 0, n_q; q0 < h.n_query; q0 += n_q) {
        n_q = std::min(n_block, (q0 < n_out ? n_out : h.n_query) - q0);
        logits(x.q + (int64_t) q0 * shape.n_embd_head_k, n_q, t.panels, h.n_cols, shape, t.x);
        int32_t i = 0;
        for (; i + 4 <= n_q; i += 4) {
            add_queries<4>(t.x + (int64_t) i * h.n_cols, t.bias, h.n_cols, s.z + q0 + i, s);
        }
        for (; i < n_q; ++i) {
            add_queries<1>(t.x + (int64_t) i * h.n_cols, t.bias, h.n_cols, s.z + q0 + i, s);
        }
        if (q0 + n_q == n_out) {
            mean_output(h, x, n_out, s);
        }
    }
}

// The stage's tokens take this pass's votes, and those of the candidates are from now on all that they have had.
void add_votes(const pass_head & h, pass_scores & s) {
    int32_t i = 0;
    h.for_all_rows([&](int32_t) { ++i; },
        [&](int32_t t) {
            float & p4 = h.a.vote_p4[h.vote(t)];
            float & p = h.a.vote_p[h.vote(t)];
            if (h.plan.n_voted[t] > 0) {
                s.s_use[i] += p4;
                s.w[i] += p;
            }
            p4 = s.s_use[i];
            p = s.w[i];
            ++i;
        });
}

void value_deviations(const pass_head & h, const pass_rows & x, pass_scores & s, float * mean) {
    const int32_t d = h.a.shape.n_embd_head_v;
    const int64_t ld = value_stride(h.a.shape);
    const float inv = h.n_cand > 0 ? 1.0f / (float) h.n_cand : 0.0f;
    std::fill_n(mean, d, 0.0f);
    for_rows(h.n_cand, [&](int32_t i) { axpy(inv, x.v + i * ld, mean, d); });
    double sum = 0.0;
    for_rows(h.n_cand, [&](int32_t i) {
        s.s_dev[i] = std::sqrt(distance2(x.v + i * ld, mean, d));
        sum += s.s_dev[i];
    });
    for_rows(h.n_cand, [&](int32_t i) { s.s_dev[i] = sum > 0.0 ? s.s_dev[i] * (float) (h.n_cand / sum) : 1.0f; });
}

} // namespace

void score_rows(const pass_head & h, const pass_rows & x, bool outputs, pass_scores & s, score_scratch & t) {
    pack_keys(h, x, t);
    sum_shares(h, x, outputs, s, t);
    add_votes(h, s);
    const int32_t n_gqa = h.a.shape.n_gqa;
    for_rows(h.n_cand, [&](int32_t i) {
        const bool is_core = i < h.n_core;
        const int32_t n_before = is_core ? 0 : h.plan.n_voted[h.plan.n_sink + i - h.n_core];
        const int32_t n_asked = std::max(h.n_query + n_before * n_gqa, 1);
        // the fewer ask, the greater is the power mean if one of them looked, and a core's best score stays
        const int32_t n_mean = is_core ? std::max(n_asked, h.plan.n_full * n_gqa) : n_asked;
        s.s_use[i] = std::sqrt(std::sqrt(s.s_use[i] * (1.0f / (float) n_mean)));
        s.w[i] *= 1.0f / (float) n_asked;
    });
    value_deviations(h, x, s, t.v_mean);
}

} // namespace semcache

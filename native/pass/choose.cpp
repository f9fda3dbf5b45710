#include "choose.h"

#include "sc-distinct.h"
#include "sc-evict.h"

#include <cmath>
#include <limits>
#include <numeric>

namespace semcache {

pass_choice::pass_choice(arena & a, const head_shape &, const pass_sizes & n) {
    winner = a.take<int32_t>(n.n_rows);
    s_use = a.take<float>(n.n_rows);
    chunk = a.take<int32_t>(n.n_rows);
    n_tok = a.take<int32_t>(n.n_rows);
}

choose_scratch::choose_scratch(arena & a, const head_shape & shape, const pass_sizes & n) {
    const int64_t d = shape.n_embd_head_k, ld = pad_to(d, MAX_NR);
    score = a.take<float>(n.n_rows);
    s_key = a.take<float>(n.n_rows);
    k_mean = a.take<float>(d);
    p = a.take<float>(std::max<int64_t>(n.n_rows, d));
    order = a.take<int32_t>(n.n_rows);
    stays = a.take<int32_t>(n.n_rows);
    metric = a.take<float>(d * ld);
    k_metric = a.take<float>(n.n_rows * ld);
}

namespace {

constexpr float EPS_WEIGHT = 1e-9f; // a row that no query looks at still takes part in its cluster's mean

// The n best candidates by t.score: t.stays.
void take_best(int32_t n_cand, int32_t n, choose_scratch & t) {
    float * s = t.score;
    std::iota(t.order, t.order + n_cand, 0);
    for_rows(n_cand, [&](int32_t i) { s[i] = std::isnan(s[i]) ? -INFINITY : s[i]; }); // NaN has no order to sort by
    std::nth_element(t.order, t.order + n, t.order + n_cand,
        [s](int32_t a, int32_t b) { return s[a] > s[b] || (s[a] == s[b] && a < b); });
    std::fill_n(t.stays, n_cand, 0);
    for_rows(n, [&](int32_t i) { t.stays[t.order[i]] = 1; });
}

// The keys least like the others, which nobody need have asked for yet, then the best scores.
void choose_winners(
    const pass_head & h, const pass_rows & x, const pass_scores & s, const pass_choice & c, choose_scratch & t) {
    const int32_t n_distinct = (int32_t) ((int64_t) h.budget() * h.plan.distinct / 100);
    key_differences(x.k, h.n_cand, h.n_cand, h.a.shape.n_embd_head_k, t.k_mean, t.score);
    take_best(h.n_cand, n_distinct, t);
    for_rows(h.n_cand, [&](int32_t i) { t.score[i] = t.stays[i] ? INFINITY : c.s_use[i] * s.s_dev[i]; });
    take_best(h.n_cand, h.budget(), t);
}

// Nearest winner by (k_i - k_j)' M (k_i - k_j), the mean squared difference of the logits that the two would receive
// from the queries that merged rows are fitted to.
void assign_losers(const pass_head & h, const pass_rows & x, pass_choice & c, choose_scratch & t) {
    const int32_t d = h.a.shape.n_embd_head_k;
    const int32_t ld = (int32_t) pad_to(d, NR); // the columns that fill a tile mean nothing
    const bool merge = h.plan.merge;
    if (merge) {
        gemm_cols(x.q, d, d, x.q, d, n_fit_query(h), ld, t.metric, ld);
        gemm_rows(x.k, d, h.n_cand, t.metric, ld, d, ld, t.k_metric, ld, false);
    }
    for_chunks(h.n_cand, c.chunk, [&](int32_t begin, int32_t end) {
        int32_t n_win = 0;
        for (int32_t i = begin; i < end; ++i) {
            n_win += t.stays[i];
            c.winner[i] = t.stays[i] ? i : DROPPED;
        }
        if (!merge || n_win == 0 || n_win == end - begin) {
            return;
        }
        for (int32_t i = begin; i < end; ++i) {
            float best = std::numeric_limits<float>::infinity();
            for (int32_t j = begin; j < end && !t.stays[i]; ++j) {
                if (!t.stays[j]) {
                    continue;
                }
                const float *ki = x.k + (int64_t) i * d, *kj = x.k + (int64_t) j * d;
                const float *mi = t.k_metric + (int64_t) i * ld, *mj = t.k_metric + (int64_t) j * ld;
                float dist = 0.0f;
                for (int32_t e = 0; e < d; ++e) {
                    dist += (ki[e] - kj[e]) * (mi[e] - mj[e]);
                }
                if (dist < best || c.winner[i] == DROPPED) { // a NaN never wins, but a loser is not lost for it
                    best = dist;
                    c.winner[i] = j;
                }
            }
        }
    });
}

} // namespace

void remember(const pass_head & h, const pass_scores & s, pass_choice & c) {
    for_rows(h.n_cand, [&](int32_t i) {
        const int32_t row = h.plan.n_row_sink + i;
        const bool is_core = i < h.n_core;
        c.chunk[i] = is_core ? chunk_of(h.a.origin[h.first + row]) : h.plan.chunk[i - h.n_core];
        c.n_tok[i] = is_core ? n_tok_of(h.a.origin[h.first + row]) : 1;
        c.s_use[i] = is_core && !evicts(h.plan.how) ? std::max(h.s_use(row), s.s_use[i]) : s.s_use[i];
    });
}

void score_by_policy(const pass_head & h, const pass_rows & x, pass_scores & s, choose_scratch & t) {
    int32_t row = 0;
    h.for_all_rows(
        [&](int32_t i) {
            const bool is_core = i >= h.plan.n_row_sink;
            t.s_key[row] = is_core ? h.s_use(i) : 0.0f;
            t.order[row++] = -1;
        },
        [&](int32_t token) {
            t.s_key[row] = h.plan.n_voted[token] > 0 ? h.a.vote_p[h.vote(token)] : 0.0f;
            t.order[row++] = token;
        });
    evict_input in = {};
    in.n_cand = h.n_cand;
    in.n_row = h.n_rows;
    in.n_embd_head_k = h.a.shape.n_embd_head_k;
    in.k = x.k;
    in.s_old = t.s_key;
    in.row_token = t.order;
    in.n_voter = h.plan.n_voter;
    in.n_gqa = h.a.shape.n_gqa;
    in.softcap = h.a.shape.softcap;
    in.q = x.q;
    in.voter_token = h.plan.voter_token;
    evict_scores(h.plan.how, in, t.p, t.score);
    for_rows(h.n_rows, [&](int32_t i) {
        if (t.order[i] >= 0) {
            h.a.vote_p[h.vote(t.order[i])] = t.score[i];
        }
    });
    std::copy_n(t.score, h.n_cand, s.s_use);
}

void choose(const pass_head & h, const pass_rows & x, pass_scores & s, pass_choice & c, choose_scratch & t) {
    const int32_t budget = h.budget();
    switch (h.plan.how) {
        case method::semantic:
            choose_winners(h, x, s, c, t);
            assign_losers(h, x, c, t);
            for_rows(h.n_cand, [&](int32_t i) { s.w[i] += EPS_WEIGHT; });
            break;
        case method::paper:
            choose_paper(h, x, c, t);
            for_rows(h.n_cand, [&](int32_t i) { s.w[i] = (float) c.n_tok[i]; });
            break;
        case method::streaming:
            for_rows(h.n_cand, [&](int32_t i) { c.winner[i] = i >= h.n_cand - budget ? i : DROPPED; });
            break;
        default: {
            const int32_t n_new = newest_kept(h.plan.how, budget, h.plan.n_window);
            std::fill_n(t.score + h.n_cand - n_new, n_new, INFINITY);
            take_best(h.n_cand, budget, t);
            for_rows(h.n_cand, [&](int32_t i) { c.winner[i] = t.stays[i] ? i : DROPPED; });
        } break;
    }
}

} // namespace semcache

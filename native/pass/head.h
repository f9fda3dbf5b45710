// head.h - one kv head of a layer, as the phases of a pass see it

#pragma once

#include "args.h"
#include "sc-quant.h"

#include <algorithm>

namespace semcache {

template <typename F> void for_rows(int32_t n, F && f) {
    for (int32_t i = 0; i < n; ++i) {
        f(i);
    }
}

// Rows in candidate order are: cores, new tokens, sinks of before, new sinks, window. The first n_cand may go.
struct pass_head {
    const pass_args & a;
    const pass_plan & plan;
    int32_t ih;
    int32_t first;   // row of the layer where the head's begin
    int32_t n_alloc; // its rows
    int32_t n_used;
    int32_t n_core, n_cand, n_rows, n_query;
    int32_t n_cols; // n_rows, up to whole panels

    pass_head(const pass_args & a, const pass_plan & plan, int32_t ih) : a(a), plan(plan), ih(ih) {
        first = a.row_first[ih];
        n_alloc = (ih + 1 < a.n_head_kv ? a.row_first[ih + 1] : a.n_row) - first;
        n_used = a.row_count[ih];
        n_core = n_used - plan.n_row_sink;
        n_cand = n_core + plan.n_new;
        n_rows = n_used + plan.n_token();
        n_query = plan.n_voter * a.shape.n_gqa;
        n_cols = (int32_t) pad_to(n_rows, NR);
    }

    // Candidates that may stay.
    int32_t budget() const { return n_alloc - plan.n_row_sink - plan.n_sink; }

    // Calls core(i) with the head's row, or token(t) with the place in the stage, for every row in candidate order.
    template <typename C, typename T> void for_all_rows(C && core, T && token) const {
        for_rows(n_core, [&](int32_t i) { core(plan.n_row_sink + i); });
        for_rows(plan.n_new, [&](int32_t i) { token(plan.n_sink + i); });
        for_rows(plan.n_row_sink, [&](int32_t i) { core(i); });
        for_rows(plan.n_sink, [&](int32_t i) { token(i); });
        for_rows(plan.n_window, [&](int32_t i) { token(plan.n_sink + plan.n_new + i); });
    }

    uint8_t * k(int32_t row) const { return a.k + (first + row) * row_size(a.k_type, a.shape.n_embd_head_k); }
    uint8_t * v(int32_t row) const { return a.v + (first + row) * row_size(a.v_type, a.shape.n_embd_head_v); }

    int64_t vote(int32_t token) const { return ih * a.vote_head + plan.cell[token]; }

    // Key and value of a row or token as f32.
    void load_core_key(int32_t row, float * x) const { load_row(a.k_type, k(row), x, a.shape.n_embd_head_k); }
    void load_core_value(int32_t row, float * x) const { load_row(a.v_type, v(row), x, a.shape.n_embd_head_v); }

    void load_token_key(int32_t token, float * x) const {
        f16_to_f32_row(a.k_stage + ih * a.k_head + plan.cell[token] * a.k_cell, x, a.shape.n_embd_head_k);
    }

    void load_token_value(int32_t token, float * x) const {
        const f16 * y = a.v_stage + ih * a.v_head + plan.cell[token] * a.v_cell;
        for_rows(a.shape.n_embd_head_v, [&](int32_t e) { x[e] = f16_to_f32(y[e * a.v_elem]); });
    }

    // Queries x [n_gqa, n_embd_head_k] of the t-th voter, neither turned nor scaled.
    void load_query(int32_t t, float * x) const {
        const int32_t n = a.shape.n_gqa / a.n_q_layer * a.shape.n_embd_head_k; // of one layer
        const int64_t row = plan.voter_row[t];
        for (int32_t l = 0; l < a.n_q_layer; ++l, x += n) {
            const int32_t first = (l * a.n_head_kv + ih) * n;
            if (a.q8) {
                q8_0_to_f32_row(a.q8 + row * (a.q_row / Q_BLOCK), first, x, n);
            } else {
                f16_to_f32_row(a.q + row * a.q_row + first, x, n);
            }
        }
    }

    // Weights of the g-th query head of the group, see pass_args; NULL: none.
    const float * query_weight(int32_t g) const {
        const int32_t layer = g / (a.shape.n_gqa / a.n_q_layer);
        return a.q_weight ? a.q_weight + layer * a.shape.n_embd_head_k : nullptr;
    }

    // Writes the row; k and v are scratch afterwards.
    void store_core(int32_t row, float * xk, float * xv) const {
        store_row(a.k_type, xk, k(row), a.shape.n_embd_head_k);
        store_row(a.v_type, xv, v(row), a.shape.n_embd_head_v);
    }
};

} // namespace semcache

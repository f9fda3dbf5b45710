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

    head_parts<f16> parts() const { return { a.heads, ih, a.shape.n_embd_head_k, a.shape.n_embd_head_v, a.n_sink }; }

    // A key or a query of the stage as it was before it was rotated, or the other way round.
    void rotate(float * x) const {
        if (a.k_rotated) {
            hadamard(x, a.shape.n_embd_head_k);
        }
    }

    // Key and value of a row or token as f32.
    void load_core_key(int32_t row, float * x) const {
        const int32_t d = a.shape.n_embd_head_k;
        if (row < plan.n_row_sink) {
            f16_to_f32_row(parts().k_sink + (int64_t) row * d, x, d);
            rotate(x);
        } else {
            load_key(a.k_type, k(row), parts().frame(), x, d);
        }
    }
    void load_core_value(int32_t row, float * x) const {
        const int32_t d = a.shape.n_embd_head_v;
        if (row < plan.n_row_sink) {
            f16_to_f32_row(parts().v_sink + (int64_t) row * d, x, d);
        } else {
            load_value(a.v_type, v(row), x, d);
        }
    }

    void load_token_key(int32_t token, float * x) const {
        decode_row(a.k_cell_type, a.k_stage + ih * a.k_head + plan.cell[token] * a.k_cell, x, a.shape.n_embd_head_k);
        rotate(x);
    }

    void load_token_value(int32_t token, float * x) const {
        const uint8_t * y = a.v_stage + ih * a.v_head + plan.cell[token] * a.v_cell;
        if (a.v_trans()) {
            for_rows(a.shape.n_embd_head_v, [&](int32_t e) { x[e] = f16_to_f32(*(const f16 *) (y + e * a.v_elem)); });
        } else {
            decode_row(a.v_cell_type, y, x, a.shape.n_embd_head_v);
        }
    }

    // Queries x [n_gqa, n_embd_head_k] of the t-th voter, neither turned nor scaled.
    void load_query(int32_t t, float * x) const {
        float * const all = x;
        const int32_t n = a.shape.n_gqa / a.n_q_layer * a.shape.n_embd_head_k; // of one layer
        for (int32_t l = 0; l < a.n_q_layer; ++l, x += n) {
            decode_row(a.q_type, a.q + plan.voter_row[t] * a.q_row, (l * a.n_head_kv + ih) * n, x, n);
        }
        for_rows(a.shape.n_gqa, [&](int32_t g) { rotate(all + (int64_t) g * a.shape.n_embd_head_k); });
    }

    // Weights of the g-th query head of the group, see pass_args; NULL: none.
    const float * query_weight(int32_t g) const {
        const int32_t layer = g / (a.shape.n_gqa / a.n_q_layer);
        return a.q_weight ? a.q_weight + layer * a.shape.n_embd_head_k : nullptr;
    }

    // Writes the row of a core, or a sink; xk and xv are scratch afterwards.
    void store_core(int32_t row, float * xk, float * xv) const {
        store_key(a.k_type, xk, parts().frame(), k(row), a.shape.n_embd_head_k);
        store_value(a.v_type, xv, v(row), a.shape.n_embd_head_v);
    }

    void store_sink(int32_t row, float * xk, float * xv) const {
        rotate(xk);
        f32_to_f16_row(xk, parts().k_sink + (int64_t) row * a.shape.n_embd_head_k, a.shape.n_embd_head_k);
        f32_to_f16_row(xv, parts().v_sink + (int64_t) row * a.shape.n_embd_head_v, a.shape.n_embd_head_v);
    }

    float bias(int32_t row) const { return row < plan.n_row_sink ? 0.0f : f16_to_f32(a.bias[first + row]); }
    float s_use(int32_t row) const { return a.s_policy ? a.s_policy[first + row] : f16_to_f32(a.s_use[first + row]); }

    void remember(int32_t row, float bias, float s_use, int32_t chunk, int32_t n_tok) const {
        a.bias[first + row] = f32_to_f16(bias);
        a.origin[first + row] = origin_of(chunk, n_tok);
        if (a.s_policy) {
            a.s_policy[first + row] = s_use;
        } else {
            a.s_use[first + row] = f32_to_f16(s_use);
        }
    }
};

} // namespace semcache

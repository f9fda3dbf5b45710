// sc-rows.h - memory of one kv head and of a stage, as the tests of the pass need it

#pragma once

#include "sc-pass.h"
#include "sc-quant.h"
#include "sc-test.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace sc_test {

using namespace semcache;

constexpr f16 F16_NAN = 0x7e00;

inline std::vector<f16> to_f16(const std::vector<float> & x) {
    std::vector<f16> y(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        y[i] = f32_to_f16(x[i]);
    }
    return y;
}

inline std::vector<float> to_f32(const f16 * x, size_t n) {
    std::vector<float> y(n);
    for (size_t i = 0; i < n; ++i) {
        y[i] = f16_to_f32(x[i]);
    }
    return y;
}

// Rows of a head, then guard rows that nobody may write.
struct head_store {
    static constexpr uint8_t GUARD = 0xff; // two of them are a NaN of f16
    static constexpr int32_t N_GUARD =
        160; // more than any test has candidates too many, so that a failure stays a failure

    head_shape shape;
    row_type type;
    int32_t n_alloc, n_sink = 0, n_used = 0, n_room;
    std::vector<uint8_t> k, v;
    std::vector<float> bias;
    std::vector<core_meta> meta;

    // n_room: rows of memory if these are more than the head may use
    head_store(const head_shape & shape, int32_t n_alloc, int32_t n_room = 0, row_type type = row_type::f16) :
        shape(shape), type(type), n_alloc(n_alloc), n_room(std::max(n_alloc, n_room)) {
        const int64_t n = this->n_room + N_GUARD;
        k.assign(n * size_k(), GUARD);
        v.assign(n * size_v(), GUARD);
        bias.assign(n, NAN);
        meta.assign(n, core_meta{ NAN, 0xffffff, 0xff });
    }

    int64_t size_k() const { return row_size(type, shape.n_embd_head_k); }
    int64_t size_v() const { return row_size(type, shape.n_embd_head_v); }

    head_rows rows() { return { k.data(), v.data(), bias.data(), meta.data(), n_alloc, n_sink, n_used, type, type }; }

    void take(const head_rows & r) {
        n_sink = r.n_sink;
        n_used = r.n_used;
    }

    // Rows of type f16.
    const f16 * key(int32_t i) const { return (const f16 *) (k.data() + i * size_k()); }
    const f16 * val(int32_t i) const { return (const f16 *) (v.data() + i * size_v()); }
    f16 * key(int32_t i) { return (f16 *) (k.data() + i * size_k()); }
    f16 * val(int32_t i) { return (f16 *) (v.data() + i * size_v()); }

    // Any row as float32.
    std::vector<float> key_f32(int32_t i) const { return load(k.data() + i * size_k(), shape.n_embd_head_k); }
    std::vector<float> val_f32(int32_t i) const { return load(v.data() + i * size_v(), shape.n_embd_head_v); }

    std::vector<float> load(const uint8_t * p, int32_t d) const {
        std::vector<float> x(d);
        load_row(type, p, x.data(), d);
        return x;
    }

    bool guards_hold() const {
        bool ok = true;
        for (int32_t i = n_room; i < n_room + N_GUARD; ++i) {
            ok = ok && std::isnan(bias[i]) && std::isnan(meta[i].s_use) && meta[i].chunk == 0xffffff;
            ok = ok && std::all_of(k.begin() + i * size_k(), k.begin() + (i + 1) * size_k(),
                           [](uint8_t x) { return x == GUARD; });
            ok = ok && std::all_of(v.begin() + i * size_v(), v.begin() + (i + 1) * size_v(),
                           [](uint8_t x) { return x == GUARD; });
        }
        return ok;
    }
};

// Bitwise equality of two heads in all that is in use.
inline void check_same_rows(const head_store & a, const head_store & b, const char * file, int line) {
    check_eq(a.n_used, b.n_used, "n_used", file, line);
    check_eq(a.n_sink, b.n_sink, "n_sink", file, line);
    const int64_t n = std::min(a.n_used, b.n_used);
    check_bits(a.k.data(), b.k.data(), n * a.size_k(), "k", file, line);
    check_bits(a.v.data(), b.v.data(), n * a.size_v(), "v", file, line);
    check_bits(a.bias.data(), b.bias.data(), n, "bias", file, line);
    check_bits(a.meta.data(), b.meta.data(), n, "meta", file, line);
}
#define CHECK_SAME_ROWS(a, b) sc_test::check_same_rows((a), (b), __FILE__, __LINE__)

// Tokens of a stage in position order, n_sink + n_new + n_window of them, and the queries that vote.
struct tokens {
    int32_t n_sink = 0, n_new = 0, n_window = 0, n_q = 0, n_full = 0;
    std::vector<f16> k, v, q;       // [n, d_k], [n, d_v], [n_q, n_gqa, d_k]
    std::vector<int32_t> chunk;     // [n_new]
    std::vector<float> cs;          // [n_q, n_rot/2, 2]
    std::vector<int32_t> token;     // [n_q] place in the stage
    std::vector<token_votes> votes; // [n] of earlier passes; empty: none
    std::vector<int32_t> n_voted;   // [n]

    int32_t n() const { return n_sink + n_new + n_window; }
};

// How a stage lies in memory: kv head `ih` of n_head_kv, cells shuffled among n_garbage others. All else is NaN.
struct layout {
    int32_t n_head_kv = 1, ih = 0;
    bool v_trans = false;
    int32_t n_garbage = 0;
    uint64_t shuffle = 0; // 0: cells in order
};

struct stage_store {
    const tokens * t;
    std::vector<f16> k, v, q;
    std::vector<int32_t> cell, n_voted, ring;
    std::vector<token_votes> votes;
    int64_t k_cell, v_cell, v_elem, q_row, k_off, v_off, q_off;

    stage_store(const tokens & t, const head_shape & shape, const layout & l) : t(&t) {
        const int64_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v, d_q = d_k * shape.n_gqa;
        const int64_t n = t.n() + l.n_garbage;
        k_cell = d_k * l.n_head_kv;
        q_row = d_q * l.n_head_kv;
        v_cell = l.v_trans ? 1 : d_v * l.n_head_kv;
        v_elem = l.v_trans ? n : 1;
        k_off = d_k * l.ih;
        q_off = d_q * l.ih;
        v_off = l.v_trans ? d_v * n * l.ih : d_v * l.ih;
        k.assign(n * k_cell, F16_NAN);
        q.assign((t.n_q + l.n_garbage) * q_row, F16_NAN);
        v.assign(n * d_v * l.n_head_kv, F16_NAN);
        votes.assign(n, { NAN, NAN });
        auto places = [&](int64_t count) {
            std::vector<int32_t> res(count);
            std::iota(res.begin(), res.end(), 0);
            if (l.shuffle) {
                rng r(l.shuffle);
                for (int32_t i = (int32_t) count - 1; i > 0; --i) {
                    std::swap(res[i], res[r.below(i + 1)]);
                }
            }
            return res;
        };
        cell = places(n);
        ring = places(t.n_q + l.n_garbage);
        n_voted.assign(t.n(), 0);
        for (int32_t i = 0; i < t.n(); ++i) {
            std::copy_n(t.k.data() + i * d_k, d_k, k.data() + k_off + cell[i] * k_cell);
            if (!t.votes.empty() && t.n_voted[i] > 0) { // those of a token without votes may be anything
                votes[cell[i]] = t.votes[i];
                n_voted[i] = t.n_voted[i];
            }
            for (int64_t e = 0; e < d_v; ++e) {
                v[v_off + cell[i] * v_cell + e * v_elem] = t.v[i * d_v + e];
            }
        }
        for (int32_t i = 0; i < t.n_q; ++i) {
            std::copy_n(t.q.data() + i * d_q, d_q, q.data() + q_off + ring[i] * q_row);
        }
        cell.resize(t.n());
    }

    stage_rows rows() {
        return { k.data() + k_off, k_cell, v.data() + v_off, v_cell, v_elem, cell.data(), t->chunk.data(), t->n_sink,
            t->n_new, t->n_window, votes.data(), n_voted.data() };
    }

    query_rows queries() const {
        return { q.data() + q_off, q_row, ring.data(), t->cs.data(), t->token.data(), t->n_q, t->n_full, nullptr, 0,
            0 };
    }

    // Votes of token i as the last pass left them.
    token_votes votes_of(int32_t i) const { return votes[cell[i]]; }
};

// Exactly what a pass over this head and stage needs, so that a sanitizer sees every step beyond.
inline void reserve(pass_workspace & ws, const head_store & h, const tokens & t) {
    ws.reserve(h.shape, h.n_used + t.n(), std::max(0, h.n_used + t.n_sink + t.n_new - h.n_alloc), t.n_q);
}

// One pass over `h`.
inline pass_result run_pass(
    head_store & h, stage_store & stage, const rope & r, const pass_params & params, pass_workspace & ws) {
    head_rows rows = h.rows();
    const pass_result res = compress_head(rows, stage.rows(), stage.queries(), h.shape, r, params, ws);
    h.take(rows);
    return res;
}

// The same with the stage in the given layout.
inline pass_result run_pass(head_store & h, const tokens & t, const rope & r, const pass_params & params,
    pass_workspace & ws, const layout & l = {}) {
    stage_store stage(t, h.shape, l);
    return run_pass(h, stage, r, params, ws);
}

inline pass_result run_pass(
    head_store & h, const tokens & t, const rope & r, const pass_params & params, const layout & l = {}) {
    pass_workspace ws;
    reserve(ws, h, t);
    return run_pass(h, t, r, params, ws, l);
}

} // namespace sc_test

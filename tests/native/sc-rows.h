// sc-rows.h - memory of one kv head and of a stage, as the tests of the pass need it

#pragma once

#include "sc-pass.h"
#include "sc-test.h"
#include "sc-vec.h"

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
    static constexpr int32_t N_GUARD = 160; // more than any test has candidates too many, so that a failure stays a failure

    head_shape shape;
    int32_t    n_alloc, n_sink = 0, n_used = 0, n_room;
    std::vector<f16>       k, v;
    std::vector<float>     bias;
    std::vector<core_meta> meta;

    // n_room: rows of memory if these are more than the head may use
    head_store(const head_shape & shape, int32_t n_alloc, int32_t n_room = 0)
        : shape(shape), n_alloc(n_alloc), n_room(std::max(n_alloc, n_room)) {
        const int64_t n = this->n_room + N_GUARD;
        k.assign(n*shape.n_embd_head_k, F16_NAN);
        v.assign(n*shape.n_embd_head_v, F16_NAN);
        bias.assign(n, NAN);
        meta.assign(n, core_meta { NAN, 0xffffff, 0xff });
    }

    head_rows rows() { return { k.data(), v.data(), bias.data(), meta.data(), n_alloc, n_sink, n_used }; }

    void take(const head_rows & r) {
        n_sink = r.n_sink;
        n_used = r.n_used;
    }

    const f16 * key(int32_t i) const { return k.data() + (int64_t) i*shape.n_embd_head_k; }
    const f16 * val(int32_t i) const { return v.data() + (int64_t) i*shape.n_embd_head_v; }

    bool guards_hold() const {
        bool ok = true;
        for (int32_t i = n_room; i < n_room + N_GUARD; ++i) {
            ok = ok && std::isnan(bias[i]) && std::isnan(meta[i].s_use) && meta[i].chunk == 0xffffff;
            ok = ok && std::all_of(key(i), key(i) + shape.n_embd_head_k, [](f16 x) { return x == F16_NAN; });
            ok = ok && std::all_of(val(i), val(i) + shape.n_embd_head_v, [](f16 x) { return x == F16_NAN; });
        }
        return ok;
    }
};

// Bitwise equality of two heads in all that is in use.
inline void check_same_rows(const head_store & a, const head_store & b, const char * file, int line) {
    check_eq(a.n_used, b.n_used, "n_used", file, line);
    check_eq(a.n_sink, b.n_sink, "n_sink", file, line);
    const int64_t n = std::min(a.n_used, b.n_used);
    check_bits(a.k.data(), b.k.data(), n*a.shape.n_embd_head_k, "k", file, line);
    check_bits(a.v.data(), b.v.data(), n*a.shape.n_embd_head_v, "v", file, line);
    check_bits(a.bias.data(), b.bias.data(), n, "bias", file, line);
    check_bits(a.meta.data(), b.meta.data(), n, "meta", file, line);
}
#define CHECK_SAME_ROWS(a, b) sc_test::check_same_rows((a), (b), __FILE__, __LINE__)

// Tokens of a stage in position order, n_sink + n_new + n_window of them. The queries of the sinks are there but unused.
struct tokens {
    int32_t n_sink = 0, n_new = 0, n_window = 0;
    std::vector<f16>     k, v, q; // [n, d_k], [n, d_v], [n, n_gqa, d_k]
    std::vector<int32_t> chunk;   // [n_new]
    std::vector<float>   cs;      // [n_new + n_window, n_rot/2, 2]

    int32_t n() const { return n_sink + n_new + n_window; }
};

// How a stage lies in memory: kv head `ih` of n_head_kv, cells shuffled among n_garbage others. All else is NaN.
struct layout {
    int32_t  n_head_kv = 1, ih = 0;
    bool     v_trans   = false;
    int32_t  n_garbage = 0;
    uint64_t shuffle   = 0; // 0: cells in order
};

struct stage_store {
    const tokens *       t;
    std::vector<f16>     k, v, q;
    std::vector<int32_t> cell;
    int64_t k_cell, v_cell, v_elem, q_cell, k_off, v_off, q_off;

    stage_store(const tokens & t, const head_shape & shape, const layout & l) : t(&t) {
        const int64_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v, d_q = d_k*shape.n_gqa;
        const int64_t n   = t.n() + l.n_garbage;
        k_cell = d_k*l.n_head_kv;
        q_cell = d_q*l.n_head_kv;
        v_cell = l.v_trans ? 1 : d_v*l.n_head_kv;
        v_elem = l.v_trans ? n : 1;
        k_off  = d_k*l.ih;
        q_off  = d_q*l.ih;
        v_off  = l.v_trans ? d_v*n*l.ih : d_v*l.ih;
        k.assign(n*k_cell, F16_NAN);
        q.assign(n*q_cell, F16_NAN);
        v.assign(n*d_v*l.n_head_kv, F16_NAN);
        cell.resize(n);
        std::iota(cell.begin(), cell.end(), 0);
        if (l.shuffle) {
            rng r(l.shuffle);
            for (int32_t i = (int32_t) n - 1; i > 0; --i) {
                std::swap(cell[i], cell[r.below(i + 1)]);
            }
        }
        for (int32_t i = 0; i < t.n(); ++i) {
            std::copy_n(t.k.data() + i*d_k, d_k, k.data() + k_off + cell[i]*k_cell);
            if (i >= t.n_sink) {
                std::copy_n(t.q.data() + i*d_q, d_q, q.data() + q_off + cell[i]*q_cell);
            }
            for (int64_t e = 0; e < d_v; ++e) {
                v[v_off + cell[i]*v_cell + e*v_elem] = t.v[i*d_v + e];
            }
        }
        cell.resize(t.n());
    }

    stage_rows rows() const {
        return { k.data() + k_off, k_cell, v.data() + v_off, v_cell, v_elem, q.data() + q_off, q_cell,
                 cell.data(), t->chunk.data(), t->cs.data(), t->n_sink, t->n_new, t->n_window };
    }
};

// Exactly what a pass over this head and stage needs, so that a sanitizer sees every step beyond.
inline void reserve(pass_workspace & ws, const head_store & h, const tokens & t) {
    ws.reserve(h.shape, h.n_used + t.n(), (t.n_new + t.n_window)*h.shape.n_gqa);
}

// One pass over `h` with the stage in the given layout.
inline pass_result run_pass(head_store & h, const tokens & t, const rope & r, const pass_params & params, pass_workspace & ws,
                            const layout & l = {}) {
    const stage_store stage(t, h.shape, l);
    head_rows rows = h.rows();
    const pass_result res = compress_head(rows, stage.rows(), h.shape, r, params, ws);
    h.take(rows);
    return res;
}

inline pass_result run_pass(head_store & h, const tokens & t, const rope & r, const pass_params & params, const layout & l = {}) {
    pass_workspace ws;
    reserve(ws, h, t);
    return run_pass(h, t, r, params, ws, l);
}

} // namespace sc_test

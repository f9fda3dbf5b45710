// sc-rows.h - memory of one kv head and of a stage, as the tests of the pass need it

#pragma once

#include "pass/head.h"
#include "pass/pass.h"
#include "sc-lookahead.h"
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

struct token_votes {
    float p4, p;
};

struct pass_params {
    method how = method::semantic;
    bool merge = true;
    int32_t distinct = DISTINCT;
};

// What a row has besides its K, V and bias.
struct row_meta {
    float s_use;
    int32_t chunk;
    int32_t n_tok;
};

// Rows of a head, then guard rows that nobody may write. The first n_sink rows are sinks, which lie elsewhere.
struct head_store {
    static constexpr uint8_t GUARD = 0xff; // two of them are a NaN of f16
    // more than any test has candidates too many, so that a failure stays a failure
    static constexpr int32_t N_GUARD = 160;

    head_shape shape;
    row_type type;
    int32_t n_alloc, n_sink = 0, n_used = 0, n_room, n_sink_room;
    bool by_policy = false; // scores are in s_policy
    std::vector<uint8_t> k, v;
    std::vector<f16> bias, s_use, heads;
    std::vector<float> s_policy;
    std::vector<int32_t> origin;

    // n_room: rows of memory if these are more than the head may use
    head_store(const head_shape & shape, int32_t n_alloc, int32_t n_room = 0, row_type type = row_type::f16,
        int32_t n_sink_room = 4) :
        shape(shape), type(type), n_alloc(n_alloc), n_room(std::max(n_alloc, n_room)), n_sink_room(n_sink_room) {
        const int64_t n = this->n_room + N_GUARD;
        k.assign(n * size_k(), GUARD);
        v.assign(n * size_v(), GUARD);
        bias.assign(n, F16_NAN);
        s_use.assign(n, F16_NAN);
        s_policy.assign(n, NAN);
        origin.assign(n, -1);
        heads.assign(head_size(shape.n_embd_head_k, shape.n_embd_head_v, n_sink_room), F16_NAN);
    }

    int64_t size_k() const { return row_size(type, shape.n_embd_head_k); }
    int64_t size_v() const { return row_size(type, shape.n_embd_head_v); }

    head_parts<f16> parts() { return { heads.data(), 0, shape.n_embd_head_k, shape.n_embd_head_v, n_sink_room }; }
    head_parts<const f16> parts() const {
        return { heads.data(), 0, shape.n_embd_head_k, shape.n_embd_head_v, n_sink_room };
    }

    float bias_of(int32_t i) const { return i < n_sink ? 0.0f : f16_to_f32(bias[i]); }

    row_meta meta(int32_t i) const {
        return { by_policy ? s_policy[i] : f16_to_f32(s_use[i]), chunk_of(origin[i]), n_tok_of(origin[i]) };
    }

    void set_meta(int32_t i, const row_meta & m) {
        s_use[i] = f32_to_f16(m.s_use);
        s_policy[i] = m.s_use;
        origin[i] = origin_of(m.chunk, m.n_tok);
    }

    // Rows of type f16.
    const f16 * key(int32_t i) const {
        return i < n_sink ? parts().k_sink + i * shape.n_embd_head_k : (const f16 *) (k.data() + i * size_k());
    }
    const f16 * val(int32_t i) const {
        return i < n_sink ? parts().v_sink + i * shape.n_embd_head_v : (const f16 *) (v.data() + i * size_v());
    }
    f16 * key(int32_t i) { return const_cast<f16 *>(((const head_store *) this)->key(i)); }
    f16 * val(int32_t i) { return const_cast<f16 *>(((const head_store *) this)->val(i)); }

    // Any row as float32.
    std::vector<float> key_f32(int32_t i) const {
        std::vector<float> x(shape.n_embd_head_k);
        if (i < n_sink) {
            f16_to_f32_row(key(i), x.data(), shape.n_embd_head_k);
        } else {
            load_key(type, k.data() + i * size_k(), parts().frame(), x.data(), shape.n_embd_head_k);
        }
        return x;
    }
    std::vector<float> val_f32(int32_t i) const {
        std::vector<float> x(shape.n_embd_head_v);
        if (i < n_sink) {
            f16_to_f32_row(val(i), x.data(), shape.n_embd_head_v);
        } else {
            load_value(type, v.data() + i * size_v(), x.data(), shape.n_embd_head_v);
        }
        return x;
    }

    bool guards_hold() const {
        bool ok = true;
        for (int32_t i = n_room; i < n_room + N_GUARD; ++i) {
            ok = ok && bias[i] == F16_NAN && s_use[i] == F16_NAN && std::isnan(s_policy[i]) && origin[i] == -1;
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
    const int64_t s = a.n_sink, n = std::max<int64_t>(0, std::min(a.n_used, b.n_used) - s);
    check_bits(a.parts().k_sink, b.parts().k_sink, s * a.shape.n_embd_head_k, "k of sinks", file, line);
    check_bits(a.parts().v_sink, b.parts().v_sink, s * a.shape.n_embd_head_v, "v of sinks", file, line);
    check_bits(a.k.data() + s * a.size_k(), b.k.data() + s * a.size_k(), n * a.size_k(), "k", file, line);
    check_bits(a.v.data() + s * a.size_v(), b.v.data() + s * a.size_v(), n * a.size_v(), "v", file, line);
    check_bits(a.bias.data() + s, b.bias.data() + s, n, "bias", file, line);
    check_bits(a.s_use.data() + s, b.s_use.data() + s, n, "s_use", file, line);
    check_bits(a.s_policy.data() + s, b.s_policy.data() + s, n, "s_policy", file, line);
    check_bits(a.origin.data() + s, b.origin.data() + s, n, "origin", file, line);
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
    layout l;
    std::vector<f16> k, v, q;
    std::vector<q8_block> q8; // of the ring instead of q, if not empty
    std::vector<int32_t> cell, n_voted, ring;
    std::vector<float> vote_p4, vote_p;
    int64_t n_cell, k_cell, v_cell, v_elem, v_head, q_row;

    stage_store(const tokens & t, const head_shape & shape, const layout & l) : t(&t), l(l) {
        const int64_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v, d_q = d_k * shape.n_gqa;
        const int64_t n = n_cell = t.n() + l.n_garbage;
        k_cell = d_k * l.n_head_kv;
        q_row = d_q * l.n_head_kv;
        v_cell = l.v_trans ? 1 : d_v * l.n_head_kv;
        v_elem = l.v_trans ? n : 1;
        v_head = l.v_trans ? d_v * n : d_v;
        const int64_t k_off = d_k * l.ih, q_off = d_q * l.ih, v_off = v_head * l.ih;
        k.assign(n * k_cell, F16_NAN);
        q.assign((t.n_q + l.n_garbage) * q_row, F16_NAN);
        v.assign(n * d_v * l.n_head_kv, F16_NAN);
        vote_p4.assign(n * l.n_head_kv, NAN);
        vote_p.assign(n * l.n_head_kv, NAN);
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
                vote_p4[l.ih * n + cell[i]] = t.votes[i].p4;
                vote_p[l.ih * n + cell[i]] = t.votes[i].p;
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

    // Votes of token i as the last pass left them.
    token_votes votes_of(int32_t i) const {
        const int64_t at = l.ih * n_cell + cell[i];
        return { vote_p4[at], vote_p[at] };
    }
};

// The arguments of a pass over one head, whose layer has other heads beside it if the stage's layout says so.
struct pass_call {
    pass_plan plan = {};
    pass_args args = {};
    std::vector<int32_t> row_first, row_count;
    std::vector<f16> heads;
    std::vector<float> back, mean_turn; // of a first pass over quantized rows
    int32_t ih;
    head_store & h;

    pass_call(head_store & h, stage_store & stage, const rope & r, const pass_params & params) : ih(stage.l.ih), h(h) {
        const tokens & t = *stage.t;
        plan.how = params.how;
        plan.merge = params.merge;
        plan.distinct = params.distinct;
        plan.n_row_sink = h.n_sink;
        plan.n_sink = t.n_sink;
        plan.n_new = t.n_new;
        plan.n_window = t.n_window;
        plan.cell = stage.cell.data();
        plan.chunk = t.chunk.data();
        plan.n_voted = stage.n_voted.data();
        plan.n_voter = t.n_q;
        plan.n_full = t.n_full;
        plan.voter_row = stage.ring.data();
        plan.voter_token = t.token.data();

        row_first.assign(stage.l.n_head_kv, h.n_alloc); // the others have no rows
        std::fill(row_first.begin(), row_first.begin() + ih + 1, 0);
        row_count.assign(stage.l.n_head_kv, 0);
        row_count[ih] = h.n_used;
        args.shape = h.shape;
        args.n_head_kv = stage.l.n_head_kv;
        args.k = h.k.data();
        args.v = h.v.data();
        args.k_type = args.v_type = h.type;
        args.bias = h.bias.data();
        args.s_use = h.s_use.data();
        h.by_policy = evicts(params.how);
        args.s_policy = h.by_policy ? h.s_policy.data() : nullptr;
        args.origin = h.origin.data();
        heads.assign(stage.l.n_head_kv * h.heads.size(), F16_NAN);
        std::copy(h.heads.begin(), h.heads.end(), heads.begin() + ih * h.heads.size());
        args.heads = heads.data();
        args.n_sink = h.n_sink_room;
        args.n_row = h.n_alloc;
        args.row_first = row_first.data();
        args.row_count = row_count.data();
        const int64_t size = sizeof(f16);
        args.k_stage = (const uint8_t *) stage.k.data();
        args.k_head = h.shape.n_embd_head_k * size;
        args.k_cell = stage.k_cell * size;
        args.v_stage = (const uint8_t *) stage.v.data();
        args.v_head = stage.v_head * size;
        args.v_cell = stage.v_cell * size;
        args.v_elem = stage.v_elem * size;
        args.vote_p4 = stage.vote_p4.data();
        args.vote_p = stage.vote_p.data();
        args.vote_head = stage.n_cell;
        args.q = (const uint8_t *) stage.q.data();
        args.q_type = row_type::f16;
        args.q_row = stage.q_row * size;
        if (!stage.q8.empty()) {
            args.q = (const uint8_t *) stage.q8.data();
            args.q_type = row_type::q8_0;
            args.q_row = row_size(row_type::q8_0, stage.q_row);
        }
        args.n_q_layer = 1;
        args.turn = t.cs.data();
        args.n_rot = 2 * (int32_t) r.inv_freq.size();
        args.neox = r.neox;
        if (h.type != row_type::f16 && h.n_used == 0) { // tokens stand at the positions from 0 on
            std::vector<int64_t> pos(t.n());
            for (int32_t i = 0; i < t.n(); ++i) {
                pos[i] = -i;
            }
            r.table(pos, back);
            r.mean_table(0, 4096, mean_turn);
            args.makes_frame = true;
            args.back = back.data();
            args.mean_turn = mean_turn.data();
        }
    }

    // Exactly what a pass over this head and stage needs, so that a sanitizer sees every step beyond.
    size_t scratch_size() const {
        const int32_t n_loser = h.n_used + plan.n_sink + plan.n_new - h.n_alloc;
        return pass_scratch_size(h.shape, { h.n_used + plan.n_token(), std::max(0, n_loser), plan.n_voter });
    }

    pass_result run() {
        std::vector<uint8_t> scratch(scratch_size() + arena::ALIGNMENT);
        return run(arena::align(scratch.data()));
    }

    pass_result run(uint8_t * scratch) {
        const pass_result res = compress_head(args, plan, ih, scratch);
        h.n_sink += plan.n_sink;
        h.n_used = row_count[ih];
        std::copy_n(heads.begin() + ih * h.heads.size(), h.heads.size(), h.heads.begin());
        return res;
    }
};

// One pass over `h`.
inline pass_result run_pass(head_store & h, stage_store & stage, const rope & r, const pass_params & params) {
    return pass_call(h, stage, r, params).run();
}

// The same with the stage in the given layout.
inline pass_result run_pass(
    head_store & h, const tokens & t, const rope & r, const pass_params & params, const layout & l = {}) {
    stage_store stage(t, h.shape, l);
    return run_pass(h, stage, r, params);
}

} // namespace sc_test

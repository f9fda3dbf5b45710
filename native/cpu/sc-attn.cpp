#include "sc-attn.h"

#include "sc-attn-few.h"

#include <algorithm>
#include <cmath>

namespace semcache {

namespace {

constexpr int32_t N_TILE = 64;   // rows of K and V that a batch converts at once: 2*64*d floats stay in the L2 cache
constexpr int32_t N_FEW = 8;     // up to this many tokens are a few: their rows, not they, are spread over threads
constexpr int32_t N_STRIP = 256; // rows that a few tokens look at between two steps of the running softmax
constexpr int32_t PART_ROWS =
    1024; // rows of a part for a few tokens, as far as there are not too few or too many parts
constexpr int32_t MIN_PART = 16, MAX_PART = 64;
constexpr int32_t MAX_THREADS = 512; // GGML_MAX_N_THREADS
constexpr int32_t N_QUERY = 192;     // query rows of a batch that share a converted tile
constexpr float MASKED = -1e30f;     // finite, so that differences of masked logits are no NaN
constexpr float MASKED_LO = -1e29f;

// Rows [begin, end) of one head: its sinks and cores, then the cells of the stage.
struct piece {
    int32_t head, begin, end;
};

enum class source { sinks, cores, cells };

row_span rows_of(const uint8_t * p, row_type type, int32_t row, int64_t d) {
    const int64_t size = row_size(type, d);
    return { p + row * size, size, type, size };
}

// Rows of one source from the row-th on; those of the sinks and cores of a head are counted together.
row_span k_span(const attn_args & a, int32_t h, source from, int32_t row) {
    const int64_t d = a.n_embd_head_k;
    switch (from) {
        case source::sinks:
            return rows_of(
                (const uint8_t *) head_parts(a.heads, h, d, a.n_embd_head_v, a.n_sink).k_sink, row_type::f16, row, d);
        case source::cores: return rows_of(a.k_core, a.k_type, a.row_first[h] + row, d);
        default: return { a.k + h * a.k_head + row * a.k_cell, a.k_cell, a.k_cell_type, row_size(a.k_cell_type, d) };
    }
}

row_span v_span(const attn_args & a, int32_t h, source from, int32_t row) {
    const int64_t d = a.n_embd_head_v;
    switch (from) {
        case source::sinks:
            return rows_of(
                (const uint8_t *) head_parts(a.heads, h, a.n_embd_head_k, d, a.n_sink).v_sink, row_type::f16, row, d);
        case source::cores: return rows_of(a.v_core, a.v_type, a.row_first[h] + row, d);
        default: return { a.v + h * a.v_head + row * a.v_cell, a.v_cell, a.v_cell_type, row_size(a.v_cell_type, d) };
    }
}

// Elements e, e + 1, ... of the values of n cells of a transposed stage.
row_span v_span_along(const attn_args & a, int32_t h, int32_t row, int32_t n) {
    return { a.v + h * a.v_head + row * a.v_cell, a.v_elem, row_type::f16, n * (int64_t) sizeof(f16) };
}

int32_t tokens_at_once(const attn_args & a) {
    return a.n_tokens <= N_FEW ? a.n_tokens : std::max(1, N_QUERY / (a.n_head / a.n_head_kv));
}

int64_t slot_size(const attn_args & a) { return a.n_embd_head_v + 2; }

// Rows that the tokens look at, of all heads.
int64_t n_rows_used(const attn_args & a) {
    int64_t n = (int64_t) a.n_head_kv * a.n_kv;
    for (int32_t h = 0; h < a.n_head_kv; ++h) {
        n += a.row_count[h];
    }
    return n;
}

// Parts that so many rows are cut into, whatever the number of threads, so that the result does not depend on it.
int32_t n_part(int64_t n_rows) { return (int32_t) std::clamp<int64_t>(n_rows / PART_ROWS, MIN_PART, MAX_PART); }

// [n_part, n_tokens, n_head] slots of (o, m, l)
int64_t slot(const attn_args & a, int32_t part, int32_t token, int32_t head) {
    return (((int64_t) part * a.n_tokens + token) * a.n_head + head) * slot_size(a);
}

int64_t slots_size(const attn_args & a) {
    return attn_in_parts(a) ? slot(a, n_part(a.n_row + (int64_t) a.n_head_kv * a.n_kv), 0, 0) : 0;
}

// Running softmax of some query rows over the rows seen so far, in the scratch of one thread.
struct online {
    int64_t ld_v, ld_x;
    float *q, *q_core; // [n_row, d_k] scaled; for cores in their frame, if they have one
    float * shift;     // [n_row] logit that the mean of the cores' keys gives
    float *k, *p;      // a tile's keys [N_TILE, d_k] and packed
    float * v;         // a tile's values [N_TILE, ld_v]
    float * x;         // logits [n_row, ld_x]
    float * o;         // [n_row, ld_v]
    float *m, *l;      // [n_row] maximum and sum

    // Lays the scratch out from `base` on (NULL: only counts) and returns its size in floats.
    int64_t layout(const attn_args & a, float * base) {
        const int64_t d_k = a.n_embd_head_k;
        const int64_t n_row = tokens_at_once(a) * (a.n_head / a.n_head_kv);
        ld_v = pad_to(a.n_embd_head_v, NR);
        ld_x = a.n_tokens <= N_FEW ? N_STRIP : N_TILE;
        int64_t used = 0;
        auto take = [&](int64_t n) {
            float * res = base ? base + used : nullptr;
            used += pad_to(n, VL);
            return res;
        };
        q = take(n_row * d_k);
        q_core = a.k_type == row_type::f16 && !a.k_rotated ? q : take(n_row * d_k);
        shift = take(n_row);
        k = take(N_TILE * d_k);
        p = take(N_TILE * d_k);
        v = take(N_TILE * ld_v);
        x = take(n_row * ld_x);
        o = take(n_row * ld_v);
        m = take(n_row);
        l = take(n_row);
        return used;
    }
};

int64_t scratch_size(const attn_args & a) { return online().layout(a, nullptr); }

float mask_at(const attn_args & a, int32_t token, int32_t cell) {
    const int64_t i = token * a.mask_token + cell;
    return a.mask_f16 ? f16_to_f32(((const f16 *) a.mask)[i]) : ((const float *) a.mask)[i];
}

// Adds the mask of one token to a row of logits; true if any cell is visible.
bool add_mask(const attn_args & a, int32_t token, int32_t cell, int32_t n, float * x) {
    const int64_t first = token * a.mask_token + cell;
    const f16 * m16 = (const f16 *) a.mask + first;
    const float * m32 = (const float *) a.mask + first;
    vf top = vset(-INFINITY);
    int32_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vf b = a.mask_f16 ? vload_f16(m16 + i) : vload(m32 + i);
        top = vmax(top, b);
        vstore(x + i, b > MASKED_LO ? vload(x + i) + b : vset(MASKED));
    }
    bool any = vmax_lanes(top) > MASKED_LO;
    for (; i < n; ++i) {
        const float b = mask_at(a, token, cell + i);
        any = any || b > MASKED_LO;
        x[i] = b > MASKED_LO ? x[i] + b : MASKED;
    }
    return any;
}

bool visible(const attn_args & a, int32_t token0, int32_t n_tokens, int32_t cell, int32_t n) {
    for (int32_t t = token0; t < token0 + n_tokens; ++t) {
        for (int32_t i = 0; i < n; ++i) {
            if (mask_at(a, t, cell + i) > MASKED_LO) {
                return true;
            }
        }
    }
    return false;
}

// Adds biases in f16 and a shift to a row of logits.
void add_bias(const f16 * bias, float shift, int32_t n, float * x) {
    int32_t i = 0;
    for (; i + VL <= n; i += VL) {
        vstore(x + i, vload(x + i) + (vload_f16(bias + i) + shift));
    }
    for (; i < n; ++i) {
        x[i] += f16_to_f32(bias[i]) + shift;
    }
}

// Logits of query row r become shares of its running softmax: x [n], padded with zeros to n_cols.
void soft_max_step(const attn_args & a, int32_t h, source from, int32_t row, int32_t n, int32_t n_cols, int32_t token,
    int32_t r, online & s) {
    float * x = s.x + r * s.ld_x;
    float shift = from == source::cores ? s.shift[r] : 0.0f;
    if (a.softcap > 0.0f) {
        for (int32_t i = 0; i < n; i += VL) {
            vstore(x + i, vsoftcap(vload(x + i) + shift, a.softcap));
        }
        shift = 0.0f;
    }
    std::fill(x + n, x + n_cols, MASKED);
    if (from == source::cores) {
        add_bias(a.bias + a.row_first[h] + row, shift, n, x);
    } else if (from == source::cells && !add_mask(a, token, row, n, x)) {
        std::fill(x, x + n_cols, 0.0f);
        return;
    }
    vf vm = vset(s.m[r]);
    for (int32_t i = 0; i < n_cols; i += VL) {
        vm = vmax(vm, vload(x + i));
    }
    const float m = vmax_lanes(vm);
    vf vl = {};
    for (int32_t i = 0; i < n_cols; i += VL) {
        const vf p = vexp(vload(x + i) - m);
        vstore(x + i, p);
        vl += p;
    }
    if (m > s.m[r]) {
        const float c = std::exp(s.m[r] - m);
        float * o = s.o + r * s.ld_v;
        for (int64_t i = 0; i < s.ld_v; i += VL) {
            vstore(o + i, vload(o + i) * c);
        }
        s.l[r] *= c;
        s.m[r] = m;
    }
    s.l[r] += vsum(vl);
}

// One tile of n rows of a source from `row` on, for any number of query rows.
void add_tile(
    const attn_args & a, int32_t h, source from, int32_t row, int32_t n, int32_t token0, int32_t n_tokens, online & s) {
    const int32_t d_k = a.n_embd_head_k, d_v = a.n_embd_head_v;
    const int32_t n_gqa = a.n_head / a.n_head_kv;
    const int32_t n_row = n_tokens * n_gqa;
    if (from == source::cells && !visible(a, token0, n_tokens, row, n)) {
        return;
    }

    const row_span k = k_span(a, h, from, row), v = v_span(a, h, from, row);
    const bool transposed = from == source::cells && a.v_trans();
    for (int32_t i = 0; i < n; ++i) {
        decode_row(k.type, k.row(i), s.k + (int64_t) i * d_k, d_k);
        float * to = s.v + i * s.ld_v;
        if (!transposed) {
            decode_row(v.type, v.row(i), to, d_v);
        }
        std::fill(to + d_v, to + s.ld_v, 0.0f);
    }
    if (transposed) { // read along the cells
        for (int32_t e = 0; e < d_v; ++e) {
            const uint8_t * elem = v.p + e * a.v_elem;
            for (int32_t i = 0; i < n; ++i) {
                s.v[i * s.ld_v + e] = f16_to_f32(*(const f16 *) (elem + i * a.v_cell));
            }
        }
    }

    const int32_t n_cols = (int32_t) pad_to(n, NR);
    const float * q = from == source::cores ? s.q_core : s.q;
    if (n_row >= MR) {
        pack_panels(s.k, d_k, n, d_k, s.p);
        gemm_panels(q, d_k, n_row, s.p, d_k, n_cols, s.x, s.ld_x);
    } else { // too few rows to pay for the packing
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t r = 0; r < n_row; ++r) {
                s.x[r * s.ld_x + i] = dot(q + (int64_t) r * d_k, s.k + (int64_t) i * d_k, d_k);
            }
        }
    }
    for (int32_t r = 0; r < n_row; ++r) {
        soft_max_step(a, h, from, row, n, n_cols, token0 + r / n_gqa, r, s);
    }
    gemm_rows(s.x, s.ld_x, n_row, s.v, s.ld_v, n, (int) s.ld_v, s.o, s.ld_v, true);
}

bool strips_fit(const attn_args & a, source from) {
    return a.n_embd_head_k % VL == 0 && a.n_embd_head_v % VL == 0 &&
           (from != source::cells || !a.v_trans() || a.v_cell == (int64_t) sizeof(f16));
}

// A strip of n rows, as add_tile.
void add_strip(const attn_args & a, int32_t h, source from, int32_t row, int32_t n, int32_t n_tokens, online & s) {
    const int32_t d_k = a.n_embd_head_k, d_v = a.n_embd_head_v;
    const int32_t n_gqa = a.n_head / a.n_head_kv, n_row = n_tokens * n_gqa;
    if (from == source::cells && !visible(a, 0, n_tokens, row, n)) {
        return;
    }
    const bool along = from == source::cells && a.v_trans(); // then a row of v is an element of all cells' values
    const row_span k = k_span(a, h, from, row), v = along ? v_span_along(a, h, row, n) : v_span(a, h, from, row);
    const float * q = from == source::cores ? s.q_core : s.q;
    with_type(k.type, [&](auto type) {
        for_queries(n_row, [&](int32_t r, auto n_q) {
            constexpr int NQ = decltype(n_q)::value;
            few_logits<decltype(type)::value, NQ, (NQ <= 4 ? 4 : 2)>(
                q + (int64_t) r * d_k, d_k, k, v, 0, n, s.x + r * s.ld_x, s.ld_x);
        });
    });
    for (int32_t r = 0; r < n_row; ++r) {
        soft_max_step(a, h, from, row, n, (int32_t) pad_to(n, VL), r / n_gqa, r, s);
    }
    const row_span k_next = k_span(a, h, from, row + n); // of the next strip, if there is one
    if (along) {
        for_queries(n_row, [&](int32_t r, auto n_q) {
            few_values_along<decltype(n_q)::value>(
                s.x + r * s.ld_x, s.ld_x, v, r == 0 ? &k_next : nullptr, n, d_v, s.o + r * s.ld_v, s.ld_v);
        });
        return;
    }
    with_type(v.type, [&](auto type) {
        for_queries(n_row, [&](int32_t r, auto n_q) {
            few_values<decltype(type)::value, decltype(n_q)::value>(
                s.x + r * s.ld_x, s.ld_x, v, r == 0 ? &k_next : nullptr, n, d_v, s.o + r * s.ld_v, s.ld_v);
        });
    });
}

// Query rows [token0, token0 + n_tokens) x group of head p.head over the rows of the piece.
void attend(const attn_args & a, const piece & p, int32_t token0, int32_t n_tokens, online & s) {
    const int32_t d_k = a.n_embd_head_k;
    const int32_t n_gqa = a.n_head / a.n_head_kv;
    const int32_t n_row = n_tokens * n_gqa;
    const int32_t n_used = a.row_count[p.head], n_sink = std::min(n_used, a.n_sink);
    const int32_t sinks_end = std::clamp(n_sink, p.begin, p.end), cores_end = std::clamp(n_used, p.begin, p.end);
    const head_parts head(a.heads, p.head, d_k, a.n_embd_head_v, a.n_sink);
    for (int32_t r = 0; r < n_row; ++r) {
        const float * from = a.q + (token0 + r / n_gqa) * a.q_token + (p.head * n_gqa + r % n_gqa) * a.q_head;
        float * q = s.q + (int64_t) r * d_k;
        for (int32_t e = 0; e < d_k; ++e) {
            q[e] = a.scale * from[e];
        }
        s.shift[r] = 0.0f;
        if (s.q_core != s.q && cores_end > sinks_end) {
            float * framed = s.q_core + (int64_t) r * d_k;
            std::copy_n(q, d_k, framed);
            if (a.k_rotated) {
                hadamard(framed, d_k);
            }
            if (a.k_type != row_type::f16) {
                s.shift[r] = frame_query(head.frame(), framed, d_k);
            }
        }
    }
    std::fill_n(s.o, n_row * s.ld_v, 0.0f);
    std::fill_n(s.l, n_row, 0.0f);
    std::fill_n(s.m, n_row, MASKED);

    auto rows = [&](source from, int32_t begin, int32_t end) {
        const bool strips = a.n_tokens <= N_FEW && strips_fit(a, from);
        const int32_t step = strips && from == source::cores ? N_STRIP : N_TILE,
                      first = from == source::cells ? n_used : 0; // tiles of cells that nobody sees are skipped
        for (int32_t i = begin; i < end; i += step) {
            const int32_t n = std::min(step, end - i);
            if (strips) {
                add_strip(a, p.head, from, i - first, n, n_tokens, s);
            } else {
                add_tile(a, p.head, from, i - first, n, token0, n_tokens, s);
            }
        }
    };
    rows(source::cores, sinks_end, cores_end);
    if (a.v_type != row_type::f16 && cores_end > sinks_end) { // what the cores gave is a sum of rotated values
        for (int32_t r = 0; r < n_row; ++r) {
            hadamard(s.o + r * s.ld_v, a.n_embd_head_v);
        }
    }
    rows(source::sinks, p.begin, sinks_end);
    rows(source::cells, cores_end, p.end);
}

// out = o/l with the sink's share taken off
void finish(const attn_args & a, int32_t head, float m, float l, const float * o, float * out) {
    float c = 1.0f;
    if (a.sinks) {
        const float sink = a.sinks[head];
        if (sink > m) {
            c = std::exp(m - sink);
            l = l * c + 1.0f;
        } else {
            l += std::exp(sink - m);
        }
    }
    c = l > 0.0f ? c / l : 0.0f;
    for (int32_t e = 0; e < a.n_embd_head_v; ++e) {
        out[e] = o[e] * c;
    }
}

// Part `part` of n_part of the rows of all heads, as pieces; at most one per head.
template <typename F> void for_pieces(const attn_args & a, int32_t part, int32_t n_part, F && f) {
    const int64_t total = n_rows_used(a);
    const int64_t begin = total * part / n_part, end = total * (part + 1) / n_part;
    int64_t at = 0;
    for (int32_t h = 0; h < a.n_head_kv; ++h) {
        const int64_t n = a.row_count[h] + a.n_kv;
        const int64_t lo = std::max(begin, at), hi = std::min(end, at + n);
        if (lo < hi) {
            f(piece{ h, (int32_t) (lo - at), (int32_t) (hi - at) });
        }
        at += n;
    }
}

// Calls f(head, tile) for the share of thread ith in the tiles of a batch. Heads have unlike numbers of rows: the tiles
// of the longest come first, each to the thread with the least to do, which all threads work out alike.
template <typename F> void for_tiles(const attn_args & a, int32_t n_tiles, int ith, int nth, F && f) {
    int64_t load[MAX_THREADS] = {};
    nth = std::min(nth, MAX_THREADS);
    auto rows = [&](int32_t h) { return (int64_t) a.row_count[h] + a.n_kv; };
    auto before = [&](int32_t h, int32_t o) { return rows(h) > rows(o) || (rows(h) == rows(o) && h < o); };
    int32_t last = -1;
    for (int32_t i = 0; i < a.n_head_kv; ++i) {
        int32_t h = -1; // the first behind `last`
        for (int32_t o = 0; o < a.n_head_kv; ++o) {
            if ((last < 0 || before(last, o)) && (h < 0 || before(o, h))) {
                h = o;
            }
        }
        last = h;
        for (int32_t tile = 0; tile < n_tiles; ++tile) {
            const auto least = std::min_element(load, load + nth);
            *least += rows(h);
            if (least - load == ith) {
                f(h, tile);
            }
        }
    }
}

void attend_batch(const attn_args & a, online & s, float * dst, int ith, int nth) {
    const int32_t n_gqa = a.n_head / a.n_head_kv, n_tile = tokens_at_once(a);
    for_tiles(a, (a.n_tokens + n_tile - 1) / n_tile, ith, nth, [&](int32_t h, int32_t tile) {
        const int32_t token0 = tile * n_tile, n_tokens = std::min(n_tile, a.n_tokens - token0);
        attend(a, { h, 0, a.row_count[h] + a.n_kv }, token0, n_tokens, s);
        for (int32_t r = 0; r < n_tokens * n_gqa; ++r) {
            const int32_t head = h * n_gqa + r % n_gqa;
            float * out = dst + ((int64_t) (token0 + r / n_gqa) * a.n_head + head) * a.n_embd_head_v;
            finish(a, head, s.m[r], s.l[r], s.o + r * s.ld_v, out);
        }
    });
}

void attend_parts(const attn_args & a, online & s, float * work, int ith, int nth) {
    const int32_t n_gqa = a.n_head / a.n_head_kv, d_v = a.n_embd_head_v, n = n_part(n_rows_used(a));
    for (int32_t part = ith; part < n; part += nth) {
        for (int32_t t = 0; t < a.n_tokens; ++t) {
            for (int32_t h = 0; h < a.n_head; ++h) {
                work[slot(a, part, t, h) + d_v] = MASKED;
            }
        }
        for_pieces(a, part, n, [&](const piece & p) {
            attend(a, p, 0, a.n_tokens, s);
            for (int32_t r = 0; r < a.n_tokens * n_gqa; ++r) {
                float * o = work + slot(a, part, r / n_gqa, p.head * n_gqa + r % n_gqa);
                std::copy_n(s.o + r * s.ld_v, d_v, o);
                o[d_v] = s.m[r];
                o[d_v + 1] = s.l[r];
            }
        });
    }
}

} // namespace

bool attn_in_parts(const attn_args & a) { return a.n_tokens <= N_FEW; }

int64_t attn_work_size(const attn_args & a, int nth) { return pad_to(slots_size(a), NR) + nth * scratch_size(a); }

void attn_part(const attn_args & a, float * work, float * dst, int ith, int nth) {
    online s;
    s.layout(a, work + pad_to(slots_size(a), NR) + ith * scratch_size(a));
    if (attn_in_parts(a)) {
        attend_parts(a, s, work, ith, nth);
    } else {
        attend_batch(a, s, dst, ith, nth);
    }
}

void attn_reduce(const attn_args & a, const float * work, float * dst, int ith, int nth) {
    const int32_t d_v = a.n_embd_head_v, n = n_part(n_rows_used(a));
    for (int32_t i = ith; i < a.n_tokens * a.n_head; i += nth) {
        const int32_t t = i / a.n_head, h = i % a.n_head;
        float * out = dst + (int64_t) i * d_v;
        float m = MASKED, l = 0.0f;
        for (int32_t p = 0; p < n; ++p) {
            m = std::max(m, work[slot(a, p, t, h) + d_v]);
        }
        std::fill_n(out, d_v, 0.0f);
        for (int32_t p = 0; p < n; ++p) {
            const float * o = work + slot(a, p, t, h);
            if (o[d_v] > MASKED_LO) {
                const float c = std::exp(o[d_v] - m);
                axpy(c, o, out, d_v);
                l += c * o[d_v + 1];
            }
        }
        finish(a, h, m, l, out, out);
    }
}

} // namespace semcache

#include "sc-attn.h"

#include "sc-vec.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace semcache {

namespace {

constexpr int32_t N_TILE    = 64;     // rows of K and V that are converted at once: 2*64*d floats stay in the L2 cache
constexpr int32_t N_FEW     = 8;      // so many tokens are a few: their rows, not their tokens, are spread over threads
constexpr int32_t N_PART    = 16;     // parts for a few tokens
constexpr int32_t N_QUERY   = 192;    // query rows of a batch that share a converted tile
constexpr float   MASKED    = -1e30f; // finite, so that differences of masked logits are no NaN
constexpr float   MASKED_LO = -1e29f;

// Rows [begin, end) of one head: first its cores, then the cells of the stage.
struct piece {
    int32_t head, begin, end;
};

// Running softmax of some query rows over the tiles seen so far.
struct online {
    std::vector<float> q;       // [n_row, d_k] scaled
    std::vector<float> k, p;    // a tile's keys [N_TILE, d_k] and packed
    std::vector<float> v;       // a tile's values [N_TILE, ld_v]
    std::vector<float> x;       // logits [n_row, N_TILE]
    std::vector<float> o;       // [n_row, ld_v]
    std::vector<float> m, l;    // [n_row] maximum and sum
    int64_t ld_v = 0;

    void reserve(int32_t n_row, int32_t d_k, int32_t d_v) {
        auto grow = [](std::vector<float> & t, int64_t n) {
            if ((int64_t) t.size() < n) {
                t.resize(n);
            }
        };
        ld_v = pad_to(d_v, NR);
        grow(q, (int64_t) n_row*d_k);
        grow(k, (int64_t) N_TILE*d_k);
        grow(p, (int64_t) N_TILE*d_k);
        grow(v, N_TILE*ld_v);
        grow(x, (int64_t) n_row*N_TILE);
        grow(o, n_row*ld_v);
        grow(m, n_row);
        grow(l, n_row);
    }
};

online & scratch() {
    static thread_local online s;
    return s;
}

float mask_at(const attn_args & a, int32_t token, int32_t cell) {
    const int64_t i = token*a.mask_token + cell;
    return a.mask_f16 ? f16_to_f32(((const f16 *) a.mask)[i]) : ((const float *) a.mask)[i];
}

// Adds the mask of one token to a row of logits; true if any cell is visible.
bool add_mask(const attn_args & a, int32_t token, int32_t cell, int32_t n, float * x) {
    bool any = false;
    for (int32_t i = 0; i < n; ++i) {
        const float b = mask_at(a, token, cell + i);
        any  = any || b > MASKED_LO;
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

// One tile: n rows of head h, cores from `row` on or cells from `row` on.
void add_tile(const attn_args & a, int32_t h, bool core, int32_t row, int32_t n, int32_t token0, int32_t n_tokens, online & s) {
    const int32_t d_k   = a.n_embd_head_k, d_v = a.n_embd_head_v;
    const int32_t n_gqa = a.n_head/a.n_head_kv;
    const int32_t n_row = n_tokens*n_gqa;
    if (!core && !visible(a, token0, n_tokens, row, n)) {
        return;
    }

    const int64_t first = core ? a.row_first[h] + row : row;
    for (int32_t i = 0; i < n; ++i) {
        f16_to_f32_row(core ? a.k_core + (first + i)*d_k : a.k + h*a.k_head + (first + i)*a.k_cell, s.k.data() + (int64_t) i*d_k, d_k);
        float * v = s.v.data() + i*s.ld_v;
        if (core) {
            f16_to_f32_row(a.v_core + (first + i)*d_v, v, d_v);
        } else if (a.v_elem == 1) {
            f16_to_f32_row(a.v + h*a.v_head + (first + i)*a.v_cell, v, d_v);
        }
        std::fill(v + d_v, v + s.ld_v, 0.0f);
    }
    if (!core && a.v_elem != 1) { // transposed cache: read along the cells
        for (int32_t e = 0; e < d_v; ++e) {
            const f16 * v = a.v + h*a.v_head + e*a.v_elem + first*a.v_cell;
            for (int32_t i = 0; i < n; ++i) {
                s.v[i*s.ld_v + e] = f16_to_f32(v[i*a.v_cell]);
            }
        }
    }

    const int32_t n_cols = (int32_t) pad_to(n, NR);
    if (n_row >= MR) {
        pack_panels(s.k.data(), d_k, n, d_k, s.p.data());
        gemm_panels(s.q.data(), d_k, n_row, s.p.data(), d_k, n_cols, s.x.data(), N_TILE);
    } else { // too few rows to pay for the packing
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t r = 0; r < n_row; ++r) {
                s.x[r*N_TILE + i] = dot(s.q.data() + (int64_t) r*d_k, s.k.data() + (int64_t) i*d_k, d_k);
            }
        }
    }

    for (int32_t r = 0; r < n_row; ++r) {
        float * x = s.x.data() + r*N_TILE;
        if (a.softcap > 0.0f) {
            for (int32_t i = 0; i < n; ++i) {
                x[i] = a.softcap*std::tanh(x[i]/a.softcap);
            }
        }
        std::fill(x + n, x + n_cols, MASKED);
        if (core) {
            for (int32_t i = 0; i < n; ++i) {
                x[i] += a.bias[first + i];
            }
        } else if (!add_mask(a, token0 + r/n_gqa, row, n, x)) {
            std::fill(x, x + n_cols, 0.0f);
            continue;
        }
        vf vm = vset(s.m[r]);
        for (int32_t i = 0; i < n_cols; i += VL) {
            vm = vmax(vm, vload(x + i));
        }
        const float m = vmax(vm);
        vf vl = {};
        for (int32_t i = 0; i < n_cols; i += VL) {
            const vf p = vexp(vload(x + i) - m);
            vstore(x + i, p);
            vl += p;
        }
        if (m > s.m[r]) {
            const float c = std::exp(s.m[r] - m);
            float * o = s.o.data() + r*s.ld_v;
            for (int64_t i = 0; i < s.ld_v; i += VL) {
                vstore(o + i, vload(o + i)*c);
            }
            s.l[r] *= c;
            s.m[r]  = m;
        }
        s.l[r] += vsum(vl);
    }

    gemm_rows(s.x.data(), N_TILE, n_row, s.v.data(), s.ld_v, n, (int) s.ld_v, s.o.data(), s.ld_v, true);
}

// Query rows [token0, token0 + n_tokens) x group of head p.head over the rows of the piece.
void attend(const attn_args & a, const piece & p, int32_t token0, int32_t n_tokens, online & s) {
    const int32_t d_k   = a.n_embd_head_k;
    const int32_t n_gqa = a.n_head/a.n_head_kv;
    const int32_t n_row = n_tokens*n_gqa;
    s.reserve(n_row, d_k, a.n_embd_head_v);
    for (int32_t r = 0; r < n_row; ++r) {
        const float * q = a.q + (token0 + r/n_gqa)*a.q_token + (p.head*n_gqa + r%n_gqa)*a.q_head;
        for (int32_t e = 0; e < d_k; ++e) {
            s.q[(int64_t) r*d_k + e] = a.scale*q[e];
        }
    }
    std::fill(s.o.begin(), s.o.begin() + n_row*s.ld_v, 0.0f);
    std::fill(s.l.begin(), s.l.begin() + n_row, 0.0f);
    std::fill(s.m.begin(), s.m.begin() + n_row, MASKED);

    const int32_t n_core = a.row_count[p.head];
    for (int32_t i = p.begin; i < std::min(p.end, n_core); i += N_TILE) {
        add_tile(a, p.head, true, i, std::min(N_TILE, std::min(p.end, n_core) - i), token0, n_tokens, s);
    }
    for (int32_t i = std::max(p.begin, n_core); i < p.end; i += N_TILE) {
        add_tile(a, p.head, false, i - n_core, std::min(N_TILE, p.end - i), token0, n_tokens, s);
    }
}

// out = o/l with the sink's share taken off
void finish(const attn_args & a, int32_t head, float m, float l, const float * o, float * out) {
    float c = 1.0f;
    if (a.sinks) {
        const float sink = a.sinks[head];
        if (sink > m) {
            c = std::exp(m - sink);
            l = l*c + 1.0f;
        } else {
            l += std::exp(sink - m);
        }
    }
    c = l > 0.0f ? c/l : 0.0f;
    for (int32_t e = 0; e < a.n_embd_head_v; ++e) {
        out[e] = o[e]*c;
    }
}

// Part i of the rows of all heads, as pieces; at most one per head.
template <typename F> void for_pieces(const attn_args & a, int32_t part, F && f) {
    int64_t total = 0;
    for (int32_t h = 0; h < a.n_head_kv; ++h) {
        total += a.row_count[h] + a.n_kv;
    }
    const int64_t begin = total*part/N_PART, end = total*(part + 1)/N_PART;
    int64_t at = 0;
    for (int32_t h = 0; h < a.n_head_kv; ++h) {
        const int64_t n  = a.row_count[h] + a.n_kv;
        const int64_t lo = std::max(begin, at), hi = std::min(end, at + n);
        if (lo < hi) {
            f(piece { h, (int32_t) (lo - at), (int32_t) (hi - at) });
        }
        at += n;
    }
}

int64_t slot_size(const attn_args & a) { return a.n_embd_head_v + 2; }

// [N_PART, n_tokens, n_head] slots of (o, m, l)
int64_t slot(const attn_args & a, int32_t part, int32_t token, int32_t head) {
    return (((int64_t) part*a.n_tokens + token)*a.n_head + head)*slot_size(a);
}

} // namespace

int32_t attn_n_part(int32_t n_tokens) { return n_tokens <= N_FEW ? N_PART : 1; }

int64_t attn_part_size(const attn_args & a) {
    return N_PART*(int64_t) a.n_tokens*a.n_head*slot_size(a);
}

void attn_part(const attn_args & a, float * out, int ith, int nth) {
    online & s = scratch();
    const int32_t n_gqa = a.n_head/a.n_head_kv;
    const int32_t d_v   = a.n_embd_head_v;
    if (attn_n_part(a.n_tokens) == 1) {
        const int32_t n_tile  = std::max(1, N_QUERY/n_gqa);
        const int32_t n_tiles = (a.n_tokens + n_tile - 1)/n_tile;
        for (int32_t i = ith; i < n_tiles*a.n_head_kv; i += nth) {
            const int32_t h = i/n_tiles, token0 = i%n_tiles*n_tile, n_tokens = std::min(n_tile, a.n_tokens - token0);
            attend(a, { h, 0, a.row_count[h] + a.n_kv }, token0, n_tokens, s);
            for (int32_t r = 0; r < n_tokens*n_gqa; ++r) {
                const int32_t head = h*n_gqa + r%n_gqa;
                finish(a, head, s.m[r], s.l[r], s.o.data() + r*s.ld_v, out + ((int64_t) (token0 + r/n_gqa)*a.n_head + head)*d_v);
            }
        }
        return;
    }
    for (int32_t part = ith; part < N_PART; part += nth) {
        for (int32_t t = 0; t < a.n_tokens; ++t) {
            for (int32_t h = 0; h < a.n_head; ++h) {
                out[slot(a, part, t, h) + d_v] = MASKED;
            }
        }
        for_pieces(a, part, [&](const piece & p) {
            attend(a, p, 0, a.n_tokens, s);
            for (int32_t r = 0; r < a.n_tokens*n_gqa; ++r) {
                float * o = out + slot(a, part, r/n_gqa, p.head*n_gqa + r%n_gqa);
                std::copy_n(s.o.data() + r*s.ld_v, d_v, o);
                o[d_v]     = s.m[r];
                o[d_v + 1] = s.l[r];
            }
        });
    }
}

void attn_reduce(const attn_args & a, const float * part, float * dst, int ith, int nth) {
    const int32_t d_v = a.n_embd_head_v;
    online & s = scratch();
    s.reserve(1, a.n_embd_head_k, d_v);
    for (int32_t i = ith; i < a.n_tokens*a.n_head; i += nth) {
        const int32_t t = i/a.n_head, h = i%a.n_head;
        float m = MASKED, l = 0.0f;
        for (int32_t p = 0; p < N_PART; ++p) {
            m = std::max(m, part[slot(a, p, t, h) + d_v]);
        }
        std::fill_n(s.o.begin(), d_v, 0.0f);
        for (int32_t p = 0; p < N_PART; ++p) {
            const float * o = part + slot(a, p, t, h);
            if (o[d_v] > MASKED_LO) {
                const float c = std::exp(o[d_v] - m);
                axpy(c, o, s.o.data(), d_v);
                l += c*o[d_v + 1];
            }
        }
        finish(a, h, m, l, s.o.data(), dst + (int64_t) i*d_v);
    }
}

} // namespace semcache

// prop-attn-many.h - prop_attn_part() for many queries, on matrix units
//
// Each warp has 16 query rows: their logits of a tile, its shares and the sums of values are matrices in its registers.
// Queries, shares, keys and values are f16, sums float32.

#pragma once

#include "mma.h"
#include "prop-attn.h"

// What a lane keeps of its warp's query rows lane/4 and lane/4 + 8.
template <int D> struct prop_attn_many {
    sc_frag_c o[D / 8];   // sums of values
    float max[2], sum[2]; // of the logits; of the shares in this lane's columns
};

// The block's queries of kv head h, as they are or as they meet the cores. Wants a barrier before, ends with one.
template <int D>
SC_DEVICE void prop_attn_many_queries(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, int h, int r0, int n_query, bool cores, SC_SHARED uchar * sh) {
    typedef prop_attn_many_shared<D> at;
    SC_SHARED float *x = (SC_SHARED float *) (sh + at::ROWS), *shift = (SC_SHARED float *) (sh + at::SHIFT);
    SC_SHARED sc_half * q = (SC_SHARED sc_half *) (sh + at::Q);
    for (int i = (int) t.id; i < SC_MANY_ROWS; i += SC_THREADS) {
        shift[i] = 0.0f;
    }
    for (int r = 0; r < SC_MANY_ROWS; r += 16) {
        prop_attn_load_queries<D>(t, a, src, h, r0 + r, n_query - r, 16, x);
        sc_sync(t);
        if (cores) {
            prop_attn_meet_cores<D>(t, a, src, h, 16, x, shift + r);
        }
        for (int i = (int) t.id; i < 16 * D; i += SC_THREADS) {
            q[(r + i / D) * at::LD + i % D] = sc_f2h(x[i]);
        }
        sc_sync(t);
    }
}

// A tile's products with the queries become logits; c: the tile's first row in the span, n: its rows.
template <int D>
SC_DEVICE void prop_attn_many_logits(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, SC_THREAD const prop_attn_span & s, int c, int n, int r0, int n_query,
    SC_THREAD sc_frag_c * x, SC_SHARED uchar * sh) {
    typedef prop_attn_many_shared<D> at;
    const int n_gqa = a.n_head / a.n_head_kv;
    SC_SHARED const float * shift = (SC_SHARED const float *) (sh + at::SHIFT);
    SC_UNROLL
    for (int j = 0; j < at::TILE / 8; ++j) {
        SC_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int r = 16 * (int) t.warp + (int) t.lane / 4 + e / 2 * 8, i = 8 * j + (int) t.lane % 4 * 2 + e % 2;
            float z = SC_MASKED;
            if (i < n && r < n_query) {
                z = sc_capped(x[j].x[e] + (s.bias < 0 ? 0.0f : shift[r]), a.softcap);
                if (s.bias >= 0) {
                    z += sc_h2f(src.bias[s.bias + c + i]);
                } else if (s.cell >= 0) {
                    const float b = sc_mask_at(a, src.mask, (r0 + r) / n_gqa, s.cell + c + i);
                    z = b > SC_MASKED_LO ? z + b : SC_MASKED;
                }
            }
            x[j].x[e] = z;
        }
    }
}

// Logits x of a tile become shares of what was seen so far, and the sums so far are scaled by as much.
template <int D>
SC_DEVICE void prop_attn_many_soft_max(
    SC_THREAD const sc_tid & t, SC_THREAD sc_frag_c * x, SC_THREAD prop_attn_many<D> & m) {
    const int N = SC_TILE(D) / 8;
    SC_UNROLL
    for (int i = 0; i < 2; ++i) {
        float mx = m.max[i], l = 0.0f;
        SC_UNROLL
        for (int j = 0; j < N; ++j) {
            mx = sc_max(mx, sc_max(x[j].x[2 * i], x[j].x[2 * i + 1]));
        }
        mx = sc_max(mx, sc_xor(t, mx, 1));
        mx = sc_max(mx, sc_xor(t, mx, 2));
        SC_UNROLL
        for (int j = 0; j < 2 * N; ++j) {
            SC_THREAD float & z = x[j / 2].x[2 * i + j % 2];
            z = z > SC_MASKED_LO ? sc_exp(z - mx) : 0.0f;
            l += z;
        }
        const float factor = sc_exp(m.max[i] - mx);
        m.max[i] = mx;
        m.sum[i] = m.sum[i] * factor + l;
        SC_UNROLL
        for (int j = 0; j < D / 8; ++j) {
            m.o[j].x[2 * i] *= factor;
            m.o[j].x[2 * i + 1] *= factor;
        }
    }
}

// The rows of a span for the block's queries; ends with a barrier.
template <int D>
SC_DEVICE void prop_attn_many_attend(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, SC_THREAD const prop_attn_span & s, int r0, int n_query,
    SC_THREAD prop_attn_many<D> & m, SC_SHARED uchar * sh) {
    typedef prop_attn_many_shared<D> at;
    SC_SHARED const float * nl = (SC_SHARED const float *) (sh + at::NL);
    SC_SHARED const sc_half * q = (SC_SHARED const sc_half *) (sh + at::Q) + 16 * (int) t.warp * at::LD;
    SC_SHARED sc_half * tile = (SC_SHARED sc_half *) (sh + at::ROWS);
    for (int c = 0; c < s.n; c += at::TILE) {
        const int n = s.n - c < at::TILE ? s.n - c : at::TILE;
        sc_load_tile<D, at::LD>(t, s.k_type, s.k + c * s.k_stride, s.k_stride, n, nl, tile);
        sc_sync(t);
        sc_frag_c x[at::TILE / 8];
        SC_UNROLL
        for (int j = 0; j < at::TILE / 8; ++j) {
            x[j].x[0] = x[j].x[1] = x[j].x[2] = x[j].x[3] = 0.0f;
        }
        for (int e = 0; e < D; e += 16) {
            const sc_frag_a y = sc_load_a(t, q + e, at::LD);
            SC_UNROLL
            for (int j = 0; j < at::TILE / 8; ++j) { // rows behind the last are any: their logits are not looked at
                sc_mma(t, x[j], y, sc_load_b_transposed(t, tile + 8 * j * at::LD + e, at::LD));
            }
        }
        sc_sync(t);
        sc_load_tile<D, at::LD>(t, s.v_type, s.v + c * s.v_stride, s.v_stride, n, nl, tile);
        for (int i = n * at::LD + (int) t.id; i < at::TILE * at::LD; i += SC_THREADS) {
            tile[i] = sc_f2h(0.0f); // a share of 0 would not make up for a NaN
        }
        prop_attn_many_logits<D>(t, a, src, s, c, n, r0, n_query, x, sh);
        prop_attn_many_soft_max<D>(t, x, m);
        sc_sync(t);
        SC_UNROLL
        for (int i = 0; i < at::TILE / 16; ++i) {
            const sc_frag_a p = { { sc_half2(x[2 * i].x[0], x[2 * i].x[1]), sc_half2(x[2 * i].x[2], x[2 * i].x[3]),
                sc_half2(x[2 * i + 1].x[0], x[2 * i + 1].x[1]), sc_half2(x[2 * i + 1].x[2], x[2 * i + 1].x[3]) } };
            SC_UNROLL
            for (int j = 0; j < D / 8; ++j) {
                sc_mma(t, m.o[j], p, sc_load_b(t, tile + 16 * i * at::LD + 8 * j, at::LD));
            }
        }
        sc_sync(t);
    }
}

// Sums of rotated values, rotated back; ends with a barrier, and wants one before.
template <int D>
SC_DEVICE void prop_attn_many_rotate(
    SC_THREAD const sc_tid & t, SC_THREAD prop_attn_many<D> & m, SC_SHARED uchar * sh) {
    SC_SHARED float * x = (SC_SHARED float *) (sh + prop_attn_many_shared<D>::ROWS);
    SC_SHARED float * own = x + (int) t.lane / 4 * D + (int) t.lane % 4 * 2;
    for (uint warp = 0; warp < SC_THREADS / SC_WARP; ++warp) {
        if (t.warp == warp) {
            SC_UNROLL
            for (int j = 0; j < D / 2; ++j) {
                own[j % 4 / 2 * 8 * D + j / 4 * 8 + j % 2] = m.o[j / 4].x[j % 4];
            }
        }
        sc_sync(t);
        sc_rotate(t, x, 16, D, 0);
        if (t.warp == warp) {
            SC_UNROLL
            for (int j = 0; j < D / 2; ++j) {
                m.o[j / 4].x[j % 4] = own[j % 4 / 2 * 8 * D + j / 4 * 8 + j % 2];
            }
        }
        sc_sync(t);
    }
}

// As prop_attn_part(), with SC_MANY_ROWS query rows of every kv head's group to a block.
template <int D>
SC_DEVICE void prop_attn_many_part(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, SC_GLOBAL float * work, SC_SHARED uchar * sh) {
    const int n_row = a.n_head / a.n_head_kv * a.n_tokens, r0 = (int) t.y * SC_MANY_ROWS;
    const int n_query = n_row - r0 < SC_MANY_ROWS ? n_row - r0 : SC_MANY_ROWS;
    sc_iq4_nl_table(t, (SC_SHARED float *) (sh + prop_attn_many_shared<D>::NL));
    sc_sync(t);
    prop_attn_line line = prop_attn_part_at(a, src.rows, t.x);
    for (int h = 0; h < a.n_head_kv; ++h) {
        const prop_attn_cut c = prop_attn_next_head(a, src.rows, h, line);
        if (c.begin >= c.end) {
            continue;
        }
        prop_attn_many<D> m;
        m.max[0] = m.max[1] = SC_MASKED;
        m.sum[0] = m.sum[1] = 0.0f;
        SC_UNROLL
        for (int j = 0; j < D / 8; ++j) {
            m.o[j].x[0] = m.o[j].x[1] = m.o[j].x[2] = m.o[j].x[3] = 0.0f;
        }
        if (c.cores_end > c.sinks_end) {
            prop_attn_many_queries<D>(t, a, src, h, r0, n_query, true, sh);
            const prop_attn_span s = prop_attn_cores<D>(a, src, h, c);
            prop_attn_many_attend<D>(t, a, src, s, r0, n_query, m, sh);
            if (a.v_type != SC_F16) {
                prop_attn_many_rotate<D>(t, m, sh);
            }
        }
        if (c.begin < c.sinks_end || c.cores_end < c.end) {
            prop_attn_many_queries<D>(t, a, src, h, r0, n_query, false, sh);
        }
        if (c.begin < c.sinks_end) {
            const prop_attn_span s = prop_attn_sinks<D>(a, src, h, c);
            prop_attn_many_attend<D>(t, a, src, s, r0, n_query, m, sh);
        }
        if (c.cores_end < c.end) {
            const prop_attn_span s = prop_attn_cells(a, src, h, c);
            prop_attn_many_attend<D>(t, a, src, s, r0, n_query, m, sh);
        }
        SC_UNROLL
        for (int i = 0; i < 2; ++i) {
            float l = m.sum[i];
            l += sc_xor(t, l, 1);
            l += sc_xor(t, l, 2);
            const int r = 16 * (int) t.warp + (int) t.lane / 4 + 8 * i, e = (int) t.lane % 4 * 2;
            if (r < n_query) {
                SC_GLOBAL float * slot = prop_attn_slot<D>(a, work, t.x, h, r0 + r);
                SC_UNROLL
                for (int j = 0; j < D / 8; ++j) {
                    slot[8 * j + e] = m.o[j].x[2 * i];
                    slot[8 * j + e + 1] = m.o[j].x[2 * i + 1];
                }
                if (e == 0) {
                    slot[D] = m.max[i];
                    slot[D + 1] = l;
                }
            }
        }
    }
}

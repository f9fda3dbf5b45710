// prop-attn.h - attention over the sinks and cores of every kv head and the cells of the stage, in parts
//
// What cpu/sc-attn.h defines, for a device. The rows of all heads, each head's sinks, cores and cells, stand in one
// line that is cut into n_part equal parts, one block each: heads of very different size load the device evenly, the
// grid does not depend on how many rows there are, and the result does not depend on who is faster. A part writes the
// sum of the values by their shares, the maximum of the logits and the sum of the shares; a second kernel puts the
// parts together.
//
// Keys and values of a tile of rows are decoded to f16 once for NQ query rows.

#pragma once

#include "attn-args.h"
#include "rows.h"

// Rows of one kind, n of them.
struct prop_attn_span {
    int n, k_type, v_type;
    SC_GLOBAL const uchar *k, *v;
    sc_i64 k_stride, v_stride;
    int bias; // of cores: where theirs begin; -1: none
    int cell; // of cells: the first one; -1: none
};

SC_DEVICE float sc_mask_at(SC_CONST const prop_attn_args & a, SC_GLOBAL const uchar * mask, int token, int cell) {
    const sc_i64 at = token * a.mask_token + cell;
    return a.mask_f16 ? sc_h2f(((SC_GLOBAL const sc_half *) mask)[at]) : ((SC_GLOBAL const float *) mask)[at];
}

// Logits of a tile's n rows, SUB threads per row; c: their first row in the span.
template <int D, int NQ>
SC_DEVICE void prop_attn_logits(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, SC_THREAD const prop_attn_span & s, int c, int n, int r0, int n_query,
    SC_SHARED uchar * sh) {
    typedef prop_attn_shared<D, NQ> at;
    const int SUB = SC_THREADS / SC_TILE(D);
    const int i = (int) t.id / SUB, part = (int) t.id % SUB, n_gqa = a.n_head / a.n_head_kv;
    SC_SHARED const float * q = (SC_SHARED const float *) (sh + (s.bias < 0 ? (int) at::Q : (int) at::Q_CORE));
    SC_SHARED const float * shift = (SC_SHARED const float *) (sh + at::SHIFT);
    SC_SHARED float * x = (SC_SHARED float *) (sh + at::X);
    SC_SHARED const sc_half * row = (SC_SHARED const sc_half *) (sh + at::TILE) + i * SC_TILE_LD(D);
    float y[NQ];
    SC_UNROLL
    for (int r = 0; r < NQ; ++r) {
        y[r] = 0.0f;
    }
    if (i < n) {
        for (int e = part * (D / SUB); e < (part + 1) * (D / SUB); ++e) {
            const float k = sc_h2f(row[e]);
            SC_UNROLL
            for (int r = 0; r < NQ; ++r) {
                y[r] += q[r * D + e] * k;
            }
        }
    }
    SC_UNROLL
    for (int r = 0; r < NQ; ++r) {
        for (int m = 1; m < SUB; m *= 2) {
            y[r] += sc_xor(t, y[r], (ushort) m);
        }
        if (part != 0) {
            continue;
        }
        float z = SC_MASKED;
        if (i < n && r < n_query) {
            z = y[r] + (s.bias < 0 ? 0.0f : shift[r]);
            z = sc_capped(z, a.softcap);
            if (s.bias >= 0) {
                z += sc_h2f(src.bias[s.bias + c + i]);
            } else if (s.cell >= 0) {
                const float b = sc_mask_at(a, src.mask, (r0 + r) / n_gqa, s.cell + c + i);
                z = b > SC_MASKED_LO ? z + b : SC_MASKED;
            }
        }
        x[r * SC_TILE(D) + i] = z;
    }
}

// A tile's logits become shares of what was seen so far; a warp takes every fourth query.
template <int D, int NQ> SC_DEVICE void prop_attn_soft_max(SC_THREAD const sc_tid & t, SC_SHARED uchar * sh) {
    typedef prop_attn_shared<D, NQ> at;
    const int N = SC_TILE(D) / SC_WARP;
    SC_SHARED float *factor = (SC_SHARED float *) (sh + at::FACTOR), *sum = (SC_SHARED float *) (sh + at::SUM);
    SC_SHARED float * max = (SC_SHARED float *) (sh + at::MAX);
    for (int r = (int) t.warp; r < NQ; r += SC_THREADS / SC_WARP) {
        SC_SHARED float * x = (SC_SHARED float *) (sh + at::X) + r * SC_TILE(D);
        const float before = max[r];
        float y[N], mx = before, l = 0.0f;
        SC_UNROLL
        for (int j = 0; j < N; ++j) {
            y[j] = x[j * SC_WARP + t.lane];
            mx = sc_max(mx, y[j]);
        }
        for (int m = SC_WARP / 2; m > 0; m /= 2) {
            mx = sc_max(mx, sc_xor(t, mx, (ushort) m));
        }
        SC_UNROLL
        for (int j = 0; j < N; ++j) {
            y[j] = y[j] > SC_MASKED_LO ? sc_exp(y[j] - mx) : 0.0f;
            x[j * SC_WARP + t.lane] = y[j];
            l += y[j];
        }
        l = sc_warp_sum(t, l);
        if (t.lane == 0) {
            factor[r] = sc_exp(before - mx);
            max[r] = mx;
            sum[r] = sum[r] * factor[r] + l;
        }
    }
}

// The rows of a span for the block's queries; ends with a barrier.
template <int D, int NQ>
SC_DEVICE void prop_attn_attend(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, SC_THREAD const prop_attn_span & s, int r0, int n_query,
    SC_SHARED uchar * sh) {
    typedef prop_attn_shared<D, NQ> at;
    const int N_GROUP = SC_THREADS / (D / 4); // of threads that add up a tile's values, four channels each
    SC_SHARED const float *nl = (SC_SHARED const float *) (sh + at::NL),
                          *factor = (SC_SHARED const float *) (sh + at::FACTOR),
                          *x = (SC_SHARED const float *) (sh + at::X);
    SC_SHARED float * o = (SC_SHARED float *) (sh + at::O);
    SC_SHARED sc_half * tile = (SC_SHARED sc_half *) (sh + at::TILE);
    const int group = (int) t.id / (D / 4), e0 = (int) t.id % (D / 4) * 4;
    float acc[NQ][4];
    SC_UNROLL
    for (int r = 0; r < NQ; ++r) {
        acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = 0.0f;
    }
    for (int c = 0; c < s.n; c += SC_TILE(D)) {
        const int n = s.n - c < SC_TILE(D) ? s.n - c : SC_TILE(D);
        sc_load_tile<D, SC_TILE_LD(D)>(t, s.k_type, s.k + c * s.k_stride, s.k_stride, n, nl, tile);
        sc_sync(t);
        prop_attn_logits<D, NQ>(t, a, src, s, c, n, r0, n_query, sh);
        sc_sync(t);
        sc_load_tile<D, SC_TILE_LD(D)>(t, s.v_type, s.v + c * s.v_stride, s.v_stride, n, nl, tile);
        prop_attn_soft_max<D, NQ>(t, sh);
        sc_sync(t);
        for (int i = (int) t.id; i < NQ * D; i += SC_THREADS) {
            o[i] *= factor[i / D];
        }
        if (group < N_GROUP) {
            SC_UNROLL
            for (int r = 0; r < NQ; ++r) {
                const float f = factor[r];
                acc[r][0] *= f;
                acc[r][1] *= f;
                acc[r][2] *= f;
                acc[r][3] *= f;
            }
            for (int i = group; i < n; i += N_GROUP) {
                SC_SHARED const sc_half * v = tile + i * SC_TILE_LD(D) + e0;
                const float v0 = sc_h2f(v[0]), v1 = sc_h2f(v[1]), v2 = sc_h2f(v[2]), v3 = sc_h2f(v[3]);
                SC_UNROLL
                for (int r = 0; r < NQ; ++r) {
                    const float p = x[r * SC_TILE(D) + i];
                    acc[r][0] += p * v0;
                    acc[r][1] += p * v1;
                    acc[r][2] += p * v2;
                    acc[r][3] += p * v3;
                }
            }
        }
        sc_sync(t);
    }
    for (int turn = 0; turn < N_GROUP; ++turn) { // one group after the other: the same sum every time
        if (group == turn) {
            SC_UNROLL
            for (int r = 0; r < NQ; ++r) {
                SC_UNROLL
                for (int j = 0; j < 4; ++j) {
                    o[r * D + e0 + j] += acc[r][j];
                }
            }
        }
        sc_sync(t);
    }
}

// Queries r0.. of kv head h times the scale, x [n, D]; those behind n_query are 0.
template <int D>
SC_DEVICE void prop_attn_load_queries(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, int h, int r0, int n_query, int n, SC_SHARED float * x) {
    const int n_gqa = a.n_head / a.n_head_kv;
    for (int i = (int) t.id; i < n * D; i += SC_THREADS) {
        const int r = i / D, row = r0 + r;
        x[i] = r < n_query ? src.q[(h * n_gqa + row % n_gqa) * a.q_head + row / n_gqa * a.q_token + i % D] * a.scale
                           : 0.0f;
    }
}

// Queries x [n, D] as they meet the cores; shift [n]: what the mean of the cores' keys adds to their logits. Ends with
// a barrier, and wants one before.
template <int D>
SC_DEVICE void prop_attn_meet_cores(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, int h, int n, SC_SHARED float * x, SC_SHARED float * shift) {
    if (a.k_rotated) {
        sc_rotate(t, x, n, D, 0);
    }
    if (a.k_type == SC_F16) {
        return;
    }
    SC_GLOBAL const sc_half *mean = src.heads + h * (sc_i64) (2 * D + 2 * D * a.n_sink), *scale = mean + D;
    for (int r = (int) t.warp; r < n; r += SC_THREADS / SC_WARP) {
        float y = 0.0f;
        for (int e = (int) t.lane; e < D; e += SC_WARP) {
            y += x[r * D + e] * sc_h2f(mean[e]);
            x[r * D + e] *= sc_h2f(scale[e]);
        }
        y = sc_warp_sum(t, y);
        if (t.lane == 0) {
            shift[r] = y;
        }
    }
    sc_sync(t);
    sc_rotate(t, x, n, D, 0);
}

// The block's queries of kv head h, as they are and as they meet the cores; ends with a barrier.
template <int D, int NQ>
SC_DEVICE void prop_attn_queries(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, int h, int r0, int n_query, bool cores, SC_SHARED uchar * sh) {
    typedef prop_attn_shared<D, NQ> at;
    SC_SHARED float *q = (SC_SHARED float *) (sh + at::Q), *q_core = (SC_SHARED float *) (sh + at::Q_CORE),
                    *o = (SC_SHARED float *) (sh + at::O), *shift = (SC_SHARED float *) (sh + at::SHIFT);
    prop_attn_load_queries<D>(t, a, src, h, r0, n_query, NQ, q);
    for (int i = (int) t.id; i < NQ * D; i += SC_THREADS) {
        q_core[i] = q[i];
        o[i] = 0.0f;
    }
    for (int i = (int) t.id; i < NQ; i += SC_THREADS) {
        ((SC_SHARED float *) (sh + at::MAX))[i] = SC_MASKED;
        ((SC_SHARED float *) (sh + at::SUM))[i] = shift[i] = 0.0f;
    }
    sc_sync(t);
    if (cores) {
        prop_attn_meet_cores<D>(t, a, src, h, NQ, q_core, shift);
    }
}

// A part: rows [lo, hi) of the line of all heads' rows.
struct prop_attn_line {
    sc_i64 lo, hi, first; // first: where the next head's rows begin
};

SC_DEVICE prop_attn_line prop_attn_part_at(SC_CONST const prop_attn_args & a, SC_GLOBAL const int * rows, uint part) {
    sc_i64 total = 0;
    for (int h = 0; h < a.n_head_kv; ++h) {
        total += rows[a.n_head_kv + h] + a.n_kv;
    }
    return { total * part / a.n_part, total * (part + 1) / a.n_part, 0 };
}

// What of a head lies in a part: sinks [begin, sinks_end), cores up to cores_end, cells up to end.
struct prop_attn_cut {
    int n_used, begin, sinks_end, cores_end, end;
};

SC_DEVICE prop_attn_cut prop_attn_next_head(
    SC_CONST const prop_attn_args & a, SC_GLOBAL const int * rows, int h, SC_THREAD prop_attn_line & line) {
    const int n_used = rows[a.n_head_kv + h], n = n_used + a.n_kv, n_sink = n_used < a.n_sink ? n_used : a.n_sink;
    const int begin = line.lo > line.first ? (int) (line.lo - line.first < n ? line.lo - line.first : n) : 0;
    const int end = line.hi < line.first + n ? (int) (line.hi > line.first ? line.hi - line.first : 0) : n;
    const int sinks_end = end < n_sink ? end : begin > n_sink ? begin : n_sink;
    const int cores_end = end < n_used ? end : sinks_end > n_used ? sinks_end : n_used;
    line.first += n;
    return { n_used, begin, sinks_end, cores_end, end };
}

template <int D>
SC_DEVICE prop_attn_span prop_attn_cores(
    SC_CONST const prop_attn_args & a, SC_THREAD const prop_attn_src & src, int h, SC_THREAD const prop_attn_cut & c) {
    const sc_i64 k_size = sc_row_size(a.k_type, D), v_size = sc_row_size(a.v_type, D);
    const sc_i64 row = src.rows[h] + c.sinks_end;
    return { c.cores_end - c.sinks_end, a.k_type, a.v_type, src.core_k + row * k_size, src.core_v + row * v_size,
        k_size, v_size, (int) row, -1 };
}

template <int D>
SC_DEVICE prop_attn_span prop_attn_sinks(
    SC_CONST const prop_attn_args & a, SC_THREAD const prop_attn_src & src, int h, SC_THREAD const prop_attn_cut & c) {
    SC_GLOBAL const uchar * k =
        (SC_GLOBAL const uchar *) (src.heads + h * (sc_i64) (2 * D + 2 * D * a.n_sink)) + 2 * (2 * D + c.begin * D);
    return { c.sinks_end - c.begin, SC_F16, SC_F16, k, k + 2 * a.n_sink * D, 2 * D, 2 * D, -1, -1 };
}

SC_DEVICE prop_attn_span prop_attn_cells(
    SC_CONST const prop_attn_args & a, SC_THREAD const prop_attn_src & src, int h, SC_THREAD const prop_attn_cut & c) {
    const int cell = c.cores_end - c.n_used;
    return { c.end - c.cores_end, a.k_cell_type, a.v_cell_type, src.k + h * a.k_head + cell * a.k_cell,
        src.v + h * a.v_head + cell * a.v_cell, a.k_cell, a.v_cell, -1, cell };
}

// Where a part's sums of a query row of kv head h go: [D] values, their maximum, the sum of the shares.
template <int D>
SC_DEVICE SC_GLOBAL float * prop_attn_slot(
    SC_CONST const prop_attn_args & a, SC_GLOBAL float * work, uint part, int h, int row) {
    const int n_gqa = a.n_head / a.n_head_kv;
    return work + (((sc_i64) part * a.n_tokens + row / n_gqa) * a.n_head + h * n_gqa + row % n_gqa) * (D + 2);
}

// Block t.x: a part; t.y: NQ query rows of every kv head's group. work [n_part, n_tokens, n_head, D + 2]
template <int D, int NQ>
SC_DEVICE void prop_attn_part(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_THREAD const prop_attn_src & src, SC_GLOBAL float * work, SC_SHARED uchar * sh) {
    typedef prop_attn_shared<D, NQ> at;
    SC_SHARED float *o = (SC_SHARED float *) (sh + at::O), *max = (SC_SHARED float *) (sh + at::MAX),
                    *sum = (SC_SHARED float *) (sh + at::SUM);
    const int n_row = a.n_head / a.n_head_kv * a.n_tokens, r0 = (int) t.y * NQ;
    const int n_query = n_row - r0 < NQ ? n_row - r0 : NQ;
    sc_iq4_nl_table(t, (SC_SHARED float *) (sh + at::NL));
    prop_attn_line line = prop_attn_part_at(a, src.rows, t.x);
    for (int h = 0; h < a.n_head_kv; ++h) {
        const prop_attn_cut c = prop_attn_next_head(a, src.rows, h, line);
        if (c.begin >= c.end) {
            continue;
        }
        const bool cores = c.cores_end > c.sinks_end;
        prop_attn_queries<D, NQ>(t, a, src, h, r0, n_query, cores, sh);
        if (cores) {
            const prop_attn_span s = prop_attn_cores<D>(a, src, h, c);
            prop_attn_attend<D, NQ>(t, a, src, s, r0, n_query, sh);
            if (a.v_type != SC_F16) { // what the cores gave is a sum of rotated values
                sc_rotate(t, o, NQ, D, 0);
            }
        }
        if (c.begin < c.sinks_end) {
            const prop_attn_span s = prop_attn_sinks<D>(a, src, h, c);
            prop_attn_attend<D, NQ>(t, a, src, s, r0, n_query, sh);
        }
        if (c.cores_end < c.end) {
            const prop_attn_span s = prop_attn_cells(a, src, h, c);
            prop_attn_attend<D, NQ>(t, a, src, s, r0, n_query, sh);
        }
        for (int i = (int) t.id; i < n_query * (D + 2); i += SC_THREADS) {
            const int r = i / (D + 2), e = i % (D + 2);
            prop_attn_slot<D>(a, work, t.x, h, r0 + r)[e] = e < D ? o[r * D + e] : e == D ? max[r] : sum[r];
        }
        sc_sync(t);
    }
}

// Block t.x: a query head of a token. Parts that have no rows of its kv head are left out.
template <int D>
SC_DEVICE void prop_attn_reduce(SC_THREAD const sc_tid & t, SC_CONST const prop_attn_args & a,
    SC_GLOBAL const int * rows, SC_GLOBAL const float * sinks, SC_GLOBAL const float * work, SC_GLOBAL float * dst) {
    const int N = (D + SC_THREADS - 1) / SC_THREADS;
    const int head = (int) t.x % a.n_head, kv = head / (a.n_head / a.n_head_kv);
    sc_i64 total = 0, first = 0;
    for (int h = 0; h < a.n_head_kv; ++h) {
        first = h == kv ? total : first;
        total += rows[a.n_head_kv + h] + a.n_kv;
    }
    const sc_i64 end = first + rows[a.n_head_kv + kv] + a.n_kv;
    float y[N], m = SC_MASKED, l = 0.0f;
    for (int j = 0; j < N; ++j) {
        y[j] = 0.0f;
    }
    for (int p = 0; p < a.n_part; ++p) {
        const sc_i64 lo = total * p / a.n_part, hi = total * (p + 1) / a.n_part;
        if (hi <= first || lo >= end || lo == hi) {
            continue;
        }
        SC_GLOBAL const float * slot = work + ((sc_i64) p * a.n_tokens * a.n_head + t.x) * (D + 2);
        const float mx = sc_max(m, slot[D]);
        const float old = sc_exp(m - mx), f = slot[D] > SC_MASKED_LO ? sc_exp(slot[D] - mx) : 0.0f;
        m = mx;
        l = l * old + f * slot[D + 1];
        for (int j = 0, e = (int) t.id; e < D; e += SC_THREADS, ++j) {
            y[j] = y[j] * old + f * slot[e];
        }
    }
    float f = 1.0f;
    if (a.has_sinks) {
        const float s = sinks[head];
        if (s > m) {
            f = sc_exp(m - s);
            l = l * f + 1.0f;
        } else {
            l += sc_exp(s - m);
        }
    }
    f = l > 0.0f ? f / l : 0.0f;
    for (int j = 0, e = (int) t.id; e < D; e += SC_THREADS, ++j) {
        dst[(sc_i64) t.x * D + e] = y[j] * f;
    }
}

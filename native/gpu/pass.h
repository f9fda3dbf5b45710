// pass.h - a pass on a device: what native/pass does, in kernels over all kv heads of a layer
//
// Block t.y is a kv head, t.x a piece of its work; the kernels stand in the order in which they run, and each says how
// many pieces there are. Between loading and storing everything is in f32 and unrotated. Sums have a fixed order, so a
// result does not depend on who is faster. Formulas and their constants are those of the files of native/pass of the
// same name.

#pragma once

#include "pass-steps.h"
#include "rows.h"

enum { SC_DROPPED = -1 };

#define SC_FRAME_FLOOR 1e-3f // see pass/frame.h
#define SC_FRAME_MIN 0.0009765625f
#define SC_FRAME_MAX 32768.0f

// One head of a layer, as pass_head: the ih-th.
struct pass_kv {
    int ih, first, n_alloc, n_used, n_core, n_cand, n_rows, budget;
};

// Of the h-th head that is worked on.
SC_DEVICE pass_kv pass_kv_of(SC_CONST const pass_dims & m, SC_THREAD const pass_data & x, int h) {
    const int ih = m.first_head + h, first = x.rows[ih], n_used = x.rows[m.n_head_kv + ih];
    const int n_alloc = (ih + 1 < m.n_head_kv ? x.rows[ih + 1] : m.n_row) - first, n_core = n_used - m.n_row_sink;
    return { ih, first, n_alloc, n_used, n_core, n_core + m.n_new, n_used + m.n_sink + m.n_new + m.n_window,
        n_alloc - m.n_row_sink - m.n_sink };
}

// Where the i-th row in candidate order comes from: a row of the head (>= 0), or the token -1 - result of the stage.
SC_DEVICE int pass_row_at(SC_CONST const pass_dims & m, SC_THREAD const pass_kv & s, int i) {
    if (i < s.n_core) {
        return m.n_row_sink + i;
    }
    i -= s.n_core;
    if (i < m.n_new) {
        return -1 - (m.n_sink + i);
    }
    i -= m.n_new;
    if (i < m.n_row_sink) {
        return i;
    }
    i -= m.n_row_sink;
    return i < m.n_sink ? -1 - i : -1 - (m.n_new + i);
}

SC_DEVICE sc_i64 pass_head_size(SC_CONST const pass_dims & m) {
    return 2 * m.d_k + (sc_i64) m.n_sink_max * (m.d_k + m.d_v);
}

// ---- what several kernels need

// Sum over the block in a fixed order; buf [SC_THREADS] is shared. Ends with a barrier.
SC_DEVICE float sc_block_sum(SC_THREAD const sc_tid & t, float x, SC_SHARED float * buf) {
    buf[t.id] = x;
    sc_sync(t);
    for (int n = SC_THREADS / 2; n > 0; n /= 2) {
        if ((int) t.id < n) {
            buf[t.id] += buf[t.id + n];
        }
        sc_sync(t);
    }
    const float y = buf[0];
    sc_sync(t);
    return y;
}

// Likewise: the maximum.
SC_DEVICE float sc_block_max(SC_THREAD const sc_tid & t, float x, SC_SHARED float * buf) {
    buf[t.id] = x;
    sc_sync(t);
    for (int n = SC_THREADS / 2; n > 0; n /= 2) {
        if ((int) t.id < n) {
            buf[t.id] = sc_max(buf[t.id], buf[t.id + n]);
        }
        sc_sync(t);
    }
    const float y = buf[0];
    sc_sync(t);
    return y;
}

// Sum over the block before this thread, and over all of it in `total`; buf [SC_THREADS] is shared. Ends with a
// barrier.
SC_DEVICE int sc_block_scan(SC_THREAD const sc_tid & t, int x, SC_SHARED int * buf, SC_THREAD int & total) {
    buf[t.id] = x;
    sc_sync(t);
    for (int n = 1; n < SC_THREADS; n *= 2) {
        const int add = (int) t.id >= n ? buf[t.id - n] : 0;
        sc_sync(t);
        buf[t.id] += add;
        sc_sync(t);
    }
    total = buf[SC_THREADS - 1];
    const int y = buf[t.id] - x;
    sc_sync(t);
    return y;
}

// Turns x [n_rot] in place by the angles cs [n_rot/2, 2], as turn() of sc-lookahead.h; lane of SC_WARP.
SC_DEVICE void sc_turn(SC_SHARED float * x, SC_GLOBAL const float * cs, int n_rot, int neox, int lane) {
    for (int i = lane; i < n_rot / 2; i += SC_WARP) {
        const int a = neox ? i : 2 * i, b = neox ? i + n_rot / 2 : 2 * i + 1;
        const float x0 = x[a], x1 = x[b];
        x[a] = x0 * cs[2 * i] - x1 * cs[2 * i + 1];
        x[b] = x0 * cs[2 * i + 1] + x1 * cs[2 * i];
    }
}

// c [n_m, n_n] (+)= a b, where a is a [n_m, n_k] or, if ta, [n_k, n_m], and b [n_k, n_n] or, if tb, [n_n, n_k]; rows of
// k with a count of 1, which stay alone, are left out, if there are counts. Tile t.x of 64 x 64, row by row of tiles.
SC_DEVICE void sc_gemm(SC_THREAD const sc_tid & t, SC_GLOBAL const float * a, int lda, bool ta,
    SC_GLOBAL const float * b, int ldb, bool tb, SC_GLOBAL float * c, int ldc, int n_m, int n_n, int n_k, bool add,
    SC_GLOBAL const int * count, SC_SHARED uchar * sh) {
    SC_SHARED float *as = (SC_SHARED float *) sh, *bs = as + SC_GEMM_K * SC_GEMM_LD;
    if (n_n <= 0) {
        return;
    }
    const int n_tile = (n_n + SC_GEMM - 1) / SC_GEMM;
    const int m0 = (int) t.x / n_tile * SC_GEMM, n0 = (int) t.x % n_tile * SC_GEMM;
    if (m0 >= n_m) {
        return;
    }
    const int tm = (int) t.id / 16 * 8, tn = (int) t.id % 16 * 4; // 8 x 4 values a thread
    float acc[8][4];
    SC_UNROLL
    for (int i = 0; i < 8; ++i) {
        acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
    }
    for (int k0 = 0; k0 < n_k; k0 += SC_GEMM_K) {
        for (int i = (int) t.id; i < SC_GEMM * SC_GEMM_K; i += SC_THREADS) {
            const int am = ta ? i % SC_GEMM : i / SC_GEMM_K, ak = ta ? i / SC_GEMM : i % SC_GEMM_K;
            const int bn = tb ? i / SC_GEMM_K : i % SC_GEMM, bk = tb ? i % SC_GEMM_K : i / SC_GEMM;
            float x = 0.0f, y = 0.0f;
            if (m0 + am < n_m && k0 + ak < n_k) {
                x = a[ta ? (sc_i64) (k0 + ak) * lda + m0 + am : (sc_i64) (m0 + am) * lda + k0 + ak];
                if (count && count[k0 + ak] == 1) {
                    x = 0.0f;
                }
            }
            if (n0 + bn < n_n && k0 + bk < n_k) {
                y = b[tb ? (sc_i64) (n0 + bn) * ldb + k0 + bk : (sc_i64) (k0 + bk) * ldb + n0 + bn];
            }
            as[ak * SC_GEMM_LD + am] = x;
            bs[bk * SC_GEMM_LD + bn] = y;
        }
        sc_sync(t);
        for (int k = 0; k < SC_GEMM_K; ++k) {
            SC_SHARED const float *x = as + k * SC_GEMM_LD + tm, *y = bs + k * SC_GEMM_LD + tn;
            SC_UNROLL
            for (int i = 0; i < 8; ++i) {
                SC_UNROLL
                for (int j = 0; j < 4; ++j) {
                    acc[i][j] += x[i] * y[j];
                }
            }
        }
        sc_sync(t);
    }
    SC_UNROLL
    for (int i = 0; i < 8; ++i) {
        SC_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (m0 + tm + i < n_m && n0 + tn + j < n_n) {
                SC_GLOBAL float * to = c + (sc_i64) (m0 + tm + i) * ldc + n0 + tn + j;
                *to = add ? *to + acc[i][j] : acc[i][j];
            }
        }
    }
}

// ---- load: pieces of SC_ROWS rows. Shared: x [SC_ROWS, d], flag [2, SC_ROWS], nl [16]

SC_DEVICE void pass_load_values(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_kv & s, bool keys, int i0, int n, SC_SHARED const float * nl, SC_SHARED float * y,
    SC_SHARED int * rotated, SC_SHARED int * framed) {
    const int d = keys ? m.d_k : m.d_v, n_share = (d + 7) / 8;
    const int core_type = keys ? m.k_type : m.v_type, cell_type = keys ? m.k_cell_type : m.v_cell_type;
    const sc_i64 size = sc_row_size(core_type, d);
    SC_GLOBAL const sc_half * head = x.heads + s.ih * pass_head_size(m);
    SC_GLOBAL const sc_half * sinks = head + 2 * m.d_k + (keys ? 0 : m.n_sink_max * m.d_k);
    for (int i = (int) t.id; i < n * n_share; i += SC_THREADS) {
        const int r = i / n_share, e0 = i % n_share * 8, from = pass_row_at(m, s, i0 + r);
        for (int e = e0; e < e0 + 8 && e < d; ++e) {
            float v;
            if (from >= m.n_row_sink) {
                v = sc_value_at(core_type, (keys ? x.k : x.v) + (s.first + from) * size, e, nl);
            } else if (from >= 0) {
                v = sc_h2f(sinks[from * d + e]);
            } else {
                const sc_i64 cell = x.cell[-1 - from];
                if (keys) {
                    v = sc_value_at(cell_type, x.k_stage + s.ih * m.k_head + cell * m.k_cell, e, nl);
                } else if (m.v_elem > 2) { // values lie along the cells
                    v = sc_h2f(
                        *(SC_GLOBAL const sc_half *) (x.v_stage + s.ih * m.v_head + cell * m.v_cell + e * m.v_elem));
                } else {
                    v = sc_value_at(cell_type, x.v_stage + s.ih * m.v_head + cell * m.v_cell, e, nl);
                }
            }
            y[r * d + e] = v;
        }
    }
    for (int r = (int) t.id; r < SC_ROWS; r += SC_THREADS) {
        const int from = r < n ? pass_row_at(m, s, i0 + r) : 0;
        framed[r] = keys && from >= m.n_row_sink && core_type != SC_F16;
        rotated[r] = r < n && (from >= m.n_row_sink ? core_type != SC_F16 : keys && m.k_rotated != 0);
    }
    sc_sync(t);
    sc_rotate(t, y, n, d, rotated);
    SC_GLOBAL const sc_half *mean = head, *scale = head + m.d_k;
    for (int i = (int) t.id; i < n * d; i += SC_THREADS) {
        if (framed[i / d]) {
            y[i] = sc_h2f(mean[i % d]) + sc_h2f(scale[i % d]) * y[i];
        }
    }
    sc_sync(t);
}

SC_DEVICE void pass_load(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, i0 = (int) t.x * SC_ROWS, d = m.d_k > m.d_v ? m.d_k : m.d_v;
    const pass_kv s = pass_kv_of(m, x, h);
    const int n = s.n_rows - i0 < SC_ROWS ? s.n_rows - i0 : SC_ROWS;
    if (n <= 0) {
        return;
    }
    SC_SHARED float *y = (SC_SHARED float *) sh, *nl = y + SC_ROWS * d;
    SC_SHARED int *rotated = (SC_SHARED int *) (nl + 16), *framed = rotated + SC_ROWS;
    sc_iq4_nl_table(t, nl);
    sc_sync(t);
    pass_load_values(t, m, x, s, true, i0, n, nl, y, rotated, framed);
    for (int i = (int) t.id; i < n * m.d_k; i += SC_THREADS) {
        w.k[((sc_i64) h * m.ld + i0) * m.d_k + i] = y[i];
    }
    sc_sync(t);
    pass_load_values(t, m, x, s, false, i0, n, nl, y, rotated, framed);
    for (int i = (int) t.id; i < n * m.d_v; i += SC_THREADS) {
        w.v[((sc_i64) h * m.ld + i0) * m.d_v + i] = y[i];
    }
    for (int r = (int) t.id; r < n; r += SC_THREADS) {
        const int from = pass_row_at(m, s, i0 + r);
        w.bias[h * m.ld + i0 + r] = from >= m.n_row_sink ? sc_h2f(x.bias[s.first + from]) : 0.0f;
    }
}

// ---- queries: a piece for every voter. Shared: x [SC_QUERIES, d_k], nl [16], flag [SC_QUERIES]

// Queries of a voter, those of the group's heads [g0, g0 + n), as they were before llama.cpp rotated them; ends with a
// barrier.
SC_DEVICE void pass_load_query(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    int h, int voter, int g0, int n, SC_SHARED float * y, SC_SHARED int * flag, SC_SHARED const float * nl) {
    const int d = m.d_k, n_layer = m.n_gqa / m.n_q_layer; // query heads of one layer
    SC_GLOBAL const uchar * row = x.q + x.voter_row[voter] * m.q_row;
    for (int i = (int) t.id; i < n * d; i += SC_THREADS) {
        const int g = g0 + i / d, l = g / n_layer;
        y[i] = sc_value_at(
            m.q_type, row, (l * m.n_head_kv + m.first_head + h) * n_layer * d + g % n_layer * d + i % d, nl);
    }
    for (int g = (int) t.id; g < n; g += SC_THREADS) {
        flag[g] = m.k_rotated;
    }
    sc_sync(t);
    sc_rotate(t, y, n, d, flag);
}

SC_DEVICE void pass_queries(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, voter = (int) t.x, d = m.d_k, n_layer = m.n_gqa / m.n_q_layer;
    SC_SHARED float *y = (SC_SHARED float *) sh, *nl = y + SC_QUERIES * d;
    SC_SHARED int * flag = (SC_SHARED int *) (nl + 16);
    const int n_fit = (m.n_voter + m.stride - 1) / m.stride;
    const int at = voter % m.stride == 0 ? voter / m.stride : n_fit + voter - voter / m.stride - 1;
    SC_GLOBAL float * to = w.q + ((sc_i64) h * m.n_voter + at) * m.n_gqa * d;
    sc_iq4_nl_table(t, nl);
    sc_sync(t);
    for (int g0 = 0; g0 < m.n_gqa; g0 += SC_QUERIES) {
        const int n = m.n_gqa - g0 < SC_QUERIES ? m.n_gqa - g0 : SC_QUERIES;
        pass_load_query(t, m, x, h, voter, g0, n, y, flag, nl);
        for (int g = (int) t.warp; m.has_weight && g < n; g += SC_THREADS / SC_WARP) { // see load.cpp
            SC_GLOBAL const float * weight = x.q_weight + (g0 + g) / n_layer * d;
            for (int e = (int) t.lane; e < d; e += SC_WARP) {
                y[g * d + e] = weight[e] != 0.0f ? y[g * d + e] / weight[e] : 0.0f;
            }
        }
        sc_sync(t);
        for (int g = (int) t.warp; g < n; g += SC_THREADS / SC_WARP) {
            sc_turn(y + g * d, x.turn + (sc_i64) voter * m.n_rot, m.n_rot, m.neox, (int) t.lane);
        }
        sc_sync(t);
        for (int i = (int) t.id; i < n * d; i += SC_THREADS) {
            const float weight = m.has_weight ? x.q_weight[(g0 + i / d) / n_layer * d + i % d] : 1.0f;
            to[g0 * d + i] = y[i] * (weight * m.scale);
        }
        sc_sync(t);
    }
}

// ---- frame: one piece, in the first pass over quantized rows

// Sums of squares x [d] over n become roots of the means, the same for both channels of a pair, and none next to
// nothing.
SC_DEVICE void pass_to_rms(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, int n, SC_SHARED float * x, SC_SHARED float * buf) {
    for (int i = (int) t.id; i < m.n_rot / 2; i += SC_THREADS) {
        const int a = m.neox ? i : 2 * i, b = m.neox ? i + m.n_rot / 2 : 2 * i + 1;
        x[a] = x[b] = 0.5f * (x[a] + x[b]);
    }
    sc_sync(t);
    float most = 0.0f;
    for (int e = (int) t.id; e < m.d_k; e += SC_THREADS) {
        x[e] = sc_sqrt(x[e] / (float) (n > 1 ? n : 1));
        most = sc_max(most, x[e]);
    }
    most = sc_block_max(t, most, buf);
    for (int e = (int) t.id; e < m.d_k; e += SC_THREADS) {
        x[e] = most > 0.0f ? sc_max(x[e], SC_FRAME_FLOOR * most) : 1.0f;
    }
    sc_sync(t);
}

SC_DEVICE void pass_frame(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, d = m.d_k, n_key = m.n_new + m.n_window;
    const pass_kv s = pass_kv_of(m, x, h);
    SC_SHARED float *y = (SC_SHARED float *) sh, *nl = y + SC_QUERIES * d, *mean = nl + 16, *dev = mean + d,
                    *ask = dev + d;
    SC_SHARED float * buf = ask + d;
    SC_SHARED int * flag = (SC_SHARED int *) (buf + SC_THREADS);
    SC_GLOBAL const float * k = w.k + (sc_i64) h * m.ld * d;
    SC_GLOBAL float * finite = w.dev + h * m.ld; // of the stage's keys
    sc_iq4_nl_table(t, nl);
    float n = 0.0f;
    for (int i = (int) t.id; i < n_key; i += SC_THREADS) {
        const int row = i < m.n_new ? s.n_core + i : s.n_rows - n_key + i;
        float kk = 0.0f;
        for (int e = 0; e < d; ++e) {
            kk += k[(sc_i64) row * d + e] * k[(sc_i64) row * d + e];
        }
        finite[i] = kk < SC_HUGE ? 1.0f : 0.0f;
        n += finite[i];
    }
    n = sc_block_sum(t, n, buf);
    // keys turned back to position 0: their mean, and how far they are from it
    for (int i = (int) t.id; i < d - m.n_rot / 2; i += SC_THREADS) {
        const bool pair = i < m.n_rot / 2;
        const int a = pair ? (m.neox ? i : 2 * i) : i + m.n_rot / 2,
                  b = pair ? (m.neox ? i + m.n_rot / 2 : 2 * i + 1) : a;
        float mean_a = 0.0f, mean_b = 0.0f, dev_a = 0.0f, dev_b = 0.0f;
        for (int round = 0; round < 2; ++round) {
            for (int j = 0; j < n_key; ++j) {
                if (finite[j] == 0.0f) {
                    continue;
                }
                const int row = j < m.n_new ? s.n_core + j : s.n_rows - n_key + j;
                float u = k[(sc_i64) row * d + a], v = k[(sc_i64) row * d + b];
                if (pair) {
                    SC_GLOBAL const float * cs = x.back + ((sc_i64) (m.n_sink + j) * (m.n_rot / 2) + i) * 2;
                    const float u0 = u;
                    u = u0 * cs[0] - v * cs[1];
                    v = u0 * cs[1] + v * cs[0];
                }
                if (round == 0) {
                    mean_a += u;
                    mean_b += v;
                } else {
                    dev_a += (u - mean_a) * (u - mean_a);
                    dev_b += (v - mean_b) * (v - mean_b);
                }
            }
            if (round == 0) {
                mean_a /= sc_max(n, 1.0f);
                mean_b /= sc_max(n, 1.0f);
            }
        }
        if (pair) { // what remains of the mean over all positions of the context
            const float c = x.mean_turn[2 * i], si = x.mean_turn[2 * i + 1];
            const float lost = n * 0.5f * sc_max(0.0f, 1.0f - c * c - si * si) * (mean_a * mean_a + mean_b * mean_b);
            dev[a] = dev_a + lost;
            dev[b] = dev_b + lost;
            mean[a] = mean_a * c - mean_b * si;
            mean[b] = mean_a * si + mean_b * c;
        } else {
            dev[a] = dev_a;
            mean[a] = mean_a;
        }
    }
    for (int e = (int) t.id; e < d; e += SC_THREADS) {
        ask[e] = 0.0f;
    }
    sc_sync(t);
    pass_to_rms(t, m, (int) n, dev, buf);
    float n_query = 0.0f;
    for (int voter = 0; voter < m.n_voter; ++voter) {
        for (int g0 = 0; g0 < m.n_gqa; g0 += SC_QUERIES) {
            const int n_g = m.n_gqa - g0 < SC_QUERIES ? m.n_gqa - g0 : SC_QUERIES;
            pass_load_query(t, m, x, h, voter, g0, n_g, y, flag, nl);
            for (int g = (int) t.warp; g < n_g; g += SC_THREADS / SC_WARP) {
                float qq = 0.0f;
                for (int e = (int) t.lane; e < d; e += SC_WARP) {
                    qq += y[g * d + e] * y[g * d + e];
                }
                qq = sc_warp_sum(t, qq);
                if (t.lane == 0) {
                    flag[g] = qq < SC_HUGE;
                }
            }
            sc_sync(t);
            for (int e = (int) t.id; e < d; e += SC_THREADS) {
                for (int g = 0; g < n_g; ++g) {
                    ask[e] += flag[g] ? y[g * d + e] * y[g * d + e] : 0.0f;
                }
            }
            for (int g = 0; g < n_g; ++g) {
                n_query += (float) flag[g];
            }
            sc_sync(t);
        }
    }
    if (n_query > 0.0f) {
        pass_to_rms(t, m, (int) n_query, ask, buf);
    } else {
        for (int e = (int) t.id; e < d; e += SC_THREADS) {
            ask[e] = 1.0f / dev[e];
        }
        sc_sync(t);
    }
    float unit = 0.0f; // stored values are about 1
    for (int e = (int) t.id; e < d; e += SC_THREADS) {
        unit += dev[e] * ask[e];
    }
    unit = sc_sqrt(sc_block_sum(t, unit, buf) / (float) d);
    SC_GLOBAL sc_half * head = x.heads + s.ih * pass_head_size(m);
    for (int e = (int) t.id; e < d; e += SC_THREADS) {
        const float scale = unit * sc_sqrt(dev[e] / ask[e]);
        head[e] = sc_f2h(mean[e]);
        head[d + e] = sc_f2h(
            scale >= SC_FRAME_MIN ? (scale < SC_FRAME_MAX ? scale : SC_FRAME_MAX) : SC_FRAME_MIN); // NaN is no scale
    }
}

// ---- score

// Pieces: tiles of [n_query, ld].
SC_DEVICE void pass_logits(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_query = pass_n_query(m);
    const pass_kv s = pass_kv_of(m, x, h);
    sc_gemm(t, w.q + (sc_i64) h * n_query * m.d_k, m.d_k, false, w.k + (sc_i64) h * m.ld * m.d_k, m.d_k, true,
        w.p + (sc_i64) h * n_query * m.ld, m.ld, n_query, s.n_rows, m.d_k, false, 0, sh);
}

// A piece for every query: logits become shares. Shared: [SC_THREADS].
SC_DEVICE void pass_shares(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_query = pass_n_query(m);
    const pass_kv s = pass_kv_of(m, x, h);
    SC_GLOBAL float * p = w.p + ((sc_i64) h * n_query + t.x) * m.ld;
    SC_GLOBAL const float * bias = w.bias + h * m.ld;
    SC_SHARED float * buf = (SC_SHARED float *) sh;
    float mx = SC_MASKED;
    for (int i = (int) t.id; i < s.n_rows; i += SC_THREADS) {
        const float y = sc_capped(p[i], m.softcap) + bias[i];
        p[i] = y;
        mx = sc_max(mx, y);
    }
    mx = sc_block_max(t, mx, buf);
    float sum = 0.0f;
    for (int i = (int) t.id; i < s.n_rows; i += SC_THREADS) {
        p[i] = sc_exp(p[i] - mx);
        sum += p[i];
    }
    sum = sc_block_sum(t, sum, buf);
    const float inv = 1.0f / sum;
    for (int i = (int) t.id; i < s.n_rows; i += SC_THREADS) {
        p[i] *= inv;
    }
    if (t.id == 0) {
        w.z[(sc_i64) h * n_query + t.x] = mx + sc_log(sum);
    }
}

// Votes of the stage, and what a row is worth by them. Pieces of SC_THREADS rows.
SC_DEVICE void pass_score(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w) {
    const int h = (int) t.y, i = (int) (t.x * SC_THREADS + t.id), n_query = pass_n_query(m), n_fit = pass_n_fit(m);
    const pass_kv s = pass_kv_of(m, x, h);
    if (i >= s.n_rows) {
        return;
    }
    SC_GLOBAL const float * p = w.p + (sc_i64) h * n_query * m.ld + i;
    float p4 = 0.0f, p1 = 0.0f;
    for (int r = 0; r < n_query; ++r, p += m.ld) {
        const float y = *p;
        p4 += y * y * (y * y);
        p1 += y;
        if (r + 1 == n_fit) {
            w.w_fit[h * m.ld + i] = p1;
        }
    }
    const int from = pass_row_at(m, s, i);
    int n_before = 0;
    if (from < 0) {
        const int token = -1 - from;
        const sc_i64 at = s.ih * m.vote_head + x.cell[token];
        n_before = x.n_voted[token];
        p4 += n_before > 0 ? x.vote_p4[at] : 0.0f;
        p1 += n_before > 0 ? x.vote_p[at] : 0.0f;
        x.vote_p4[at] = p4;
        x.vote_p[at] = p1;
    }
    if (i >= s.n_cand) {
        return;
    }
    const bool is_core = from >= 0;
    const int n_asked = n_query + n_before * m.n_gqa > 1 ? n_query + n_before * m.n_gqa : 1;
    const int n_mean = is_core && m.n_full * m.n_gqa > n_asked ? m.n_full * m.n_gqa : n_asked;
    float use = sc_sqrt(sc_sqrt(p4 * (1.0f / (float) n_mean)));
    const int at = h * m.ld + i;
    w.chunk[at] = is_core ? (int) ((uint) x.origin[s.first + from] >> 8) : x.chunk[i - s.n_core];
    w.n_tok[at] = is_core ? x.origin[s.first + from] & 255 : 1;
    w.s_use[at] = is_core ? sc_max(sc_h2f(x.s_use[s.first + from]), use) : use;
    w.w[at] = p1 * (1.0f / (float) n_asked) + 1e-9f;
}

// Mean output of the fitted queries. A piece for every value of it. Shared: [SC_THREADS].
SC_DEVICE void pass_output(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y;
    const pass_kv s = pass_kv_of(m, x, h);
    float sum = 0.0f;
    for (int i = (int) t.id; i < s.n_rows; i += SC_THREADS) {
        sum += w.w_fit[h * m.ld + i] * w.v[((sc_i64) h * m.ld + i) * m.d_v + t.x];
    }
    sum = sc_block_sum(t, sum, (SC_SHARED float *) sh);
    if (t.id == 0) {
        w.out[h * m.d_v + t.x] = sum / (float) pass_n_fit(m);
    }
}

// How far values are from their mean, in parts of the mean distance, and how little keys are like the others. One
// piece. Shared: [SC_THREADS] and mean [d].
SC_DEVICE void pass_distances(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y;
    const pass_kv s = pass_kv_of(m, x, h);
    SC_SHARED float *buf = (SC_SHARED float *) sh, *mean = buf + SC_THREADS;
    SC_GLOBAL const float *v = w.v + (sc_i64) h * m.ld * m.d_v, *k = w.k + (sc_i64) h * m.ld * m.d_k;
    SC_GLOBAL float *dev = w.dev + h * m.ld, *difference = w.difference + h * m.ld;
    const float inv = s.n_cand > 0 ? 1.0f / (float) s.n_cand : 0.0f;
    for (int e = (int) t.id; e < m.d_v; e += SC_THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < s.n_cand; ++i) {
            sum += inv * v[(sc_i64) i * m.d_v + e];
        }
        mean[e] = sum;
    }
    sc_sync(t);
    float sum = 0.0f;
    for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
        float d2 = 0.0f;
        for (int e = 0; e < m.d_v; ++e) {
            const float y = v[(sc_i64) i * m.d_v + e] - mean[e];
            d2 += y * y;
        }
        dev[i] = sc_sqrt(d2);
        sum += dev[i];
    }
    sum = sc_block_sum(t, sum, buf);
    for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
        dev[i] = sum > 0.0f ? dev[i] * ((float) s.n_cand / sum) : 1.0f;
        float kk = 0.0f;
        for (int e = 0; e < m.d_k; ++e) {
            kk += k[(sc_i64) i * m.d_k + e] * k[(sc_i64) i * m.d_k + e];
        }
        difference[i] = 1.0f / sc_max(sc_sqrt(kk), 1e-12f);
    }
    sc_sync(t);
    for (int e = (int) t.id; e < m.d_k; e += SC_THREADS) {
        float y = 0.0f;
        for (int i = 0; i < s.n_cand; ++i) {
            y += difference[i] * k[(sc_i64) i * m.d_k + e];
        }
        mean[e] = y;
    }
    sc_sync(t);
    float norm = 0.0f;
    for (int e = (int) t.id; e < m.d_k; e += SC_THREADS) {
        norm += mean[e] * mean[e];
    }
    norm = 1.0f / sc_max(sc_sqrt(sc_block_sum(t, norm, buf)), 1e-12f);
    for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
        float y = 0.0f;
        for (int e = 0; e < m.d_k; ++e) {
            y += k[(sc_i64) i * m.d_k + e] * mean[e];
        }
        difference[i] *= -norm * y;
    }
}

// ---- choose

// A float's bits so that they sort as it does; NaN as the smallest.
SC_DEVICE uint sc_sortable(float x) {
    const uint b = sc_is_nan(x) ? 0xff800000u : sc_float_bits(x);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

// What the i-th candidate is chosen by: its difference, or, where those that are chosen already come first, its score.
SC_DEVICE uint pass_key(SC_THREAD const pass_work & w, int at, bool again, int i) {
    if (!again) {
        return sc_sortable(w.difference[at + i]);
    }
    return w.stays[at + i] & 1 ? 0xffffffffu : sc_sortable(w.s_use[at + i] * w.dev[at + i]);
}

// The n best of a head's candidates stay, of equals the first; buf [SC_THREADS] is shared. Ends with a barrier.
SC_DEVICE void pass_take_best(SC_THREAD const sc_tid & t, SC_THREAD const pass_work & w, int at, bool again, int n_cand,
    int n, SC_SHARED int * buf) {
    uint least = 0; // the n-th largest key, bit by bit
    int total;
    for (int bit = 31; bit >= 0; --bit) {
        const uint tried = least | 1u << bit;
        int count = 0;
        for (int i = (int) t.id; i < n_cand; i += SC_THREADS) {
            count += pass_key(w, at, again, i) >= tried;
        }
        sc_block_scan(t, count, buf, total);
        least = total >= n ? tried : least;
    }
    int above = 0, seen = 0;
    for (int i = (int) t.id; i < n_cand; i += SC_THREADS) {
        above += pass_key(w, at, again, i) > least;
    }
    sc_block_scan(t, above, buf, total);
    const int n_equal = n - total;
    for (int i0 = 0; i0 < n_cand; i0 += SC_THREADS) {
        const int i = i0 + (int) t.id;
        const uint y = i < n_cand ? pass_key(w, at, again, i) : 0u;
        const bool equal = i < n_cand && y == least;
        const int before = sc_block_scan(t, equal, buf, total);
        if (i < n_cand && n > 0 && (y > least || (equal && seen + before < n_equal))) {
            w.stays[at + i] |= 2;
        }
        seen += total;
    }
    for (int i = (int) t.id; i < n_cand; i += SC_THREADS) {
        w.stays[at + i] >>= 1;
    }
    sc_sync(t);
}

// One piece. Shared: [SC_THREADS].
SC_DEVICE void pass_choose(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, at = h * m.ld;
    const pass_kv s = pass_kv_of(m, x, h);
    SC_SHARED int * buf = (SC_SHARED int *) sh;
    for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
        w.stays[at + i] = 0;
    }
    sc_sync(t);
    if (s.n_cand <= s.budget) {
        for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
            w.stays[at + i] = 1;
        }
        return;
    }
    // the keys least like the others, which nobody need have asked for yet, then the best scores
    pass_take_best(t, w, at, false, s.n_cand, (int) ((sc_i64) s.budget * m.distinct / 100), buf);
    pass_take_best(t, w, at, true, s.n_cand, s.budget, buf);
}

// Pieces: tiles of [d_k, d_k].
SC_DEVICE void pass_metric(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y;
    SC_GLOBAL const float * q = w.q + (sc_i64) h * pass_n_query(m) * m.d_k;
    sc_gemm(t, q, m.d_k, true, q, m.d_k, false, w.metric + (sc_i64) h * m.d_k * m.d_k, m.d_k, m.d_k, m.d_k,
        pass_n_fit(m), false, 0, sh);
}

// Pieces: tiles of [ld, d_k].
SC_DEVICE void pass_key_metric(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y;
    const pass_kv s = pass_kv_of(m, x, h);
    sc_gemm(t, w.k + (sc_i64) h * m.ld * m.d_k, m.d_k, false, w.metric + (sc_i64) h * m.d_k * m.d_k, m.d_k, false,
        w.k_metric + (sc_i64) h * m.ld * m.d_k, m.d_k, s.n_cand, m.d_k, m.d_k, false, 0, sh);
}

// The chunk of the i-th of n candidates.
SC_DEVICE void pass_chunk(SC_GLOBAL const int * chunk, int n, int i, SC_THREAD int & begin, SC_THREAD int & end) {
    begin = i;
    end = i + 1;
    while (begin > 0 && chunk[begin - 1] == chunk[i]) {
        --begin;
    }
    while (end < n && chunk[end] == chunk[i]) {
        ++end;
    }
}

// Nearest winner of its chunk, for a candidate a warp. Pieces of SC_THREADS / SC_WARP candidates.
SC_DEVICE void pass_assign(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w) {
    const int h = (int) t.y, i = (int) (t.x * (SC_THREADS / SC_WARP) + t.warp), d = m.d_k;
    const pass_kv s = pass_kv_of(m, x, h);
    if (i >= s.n_cand) {
        return;
    }
    SC_GLOBAL const int *stays = w.stays + h * m.ld, *chunk = w.chunk + h * m.ld;
    SC_GLOBAL const float *k = w.k + (sc_i64) h * m.ld * d, *km = w.k_metric + (sc_i64) h * m.ld * d;
    int winner = stays[i] ? i : (int) SC_DROPPED;
    if (!stays[i] && m.merge) {
        int begin, end;
        pass_chunk(chunk, s.n_cand, i, begin, end);
        float best = 0.0f;
        for (int j = begin; j < end; ++j) {
            if (!stays[j]) {
                continue;
            }
            float y = 0.0f;
            for (int e = (int) t.lane; e < d; e += SC_WARP) {
                y +=
                    (k[(sc_i64) i * d + e] - k[(sc_i64) j * d + e]) * (km[(sc_i64) i * d + e] - km[(sc_i64) j * d + e]);
            }
            y = sc_warp_sum(t, y);
            if (winner == SC_DROPPED || y < best) { // a NaN never wins, but a loser is not lost for it
                best = sc_is_nan(y) ? SC_HUGE : y;
                winner = j;
            }
        }
    }
    if (t.lane == 0) {
        w.winner[h * m.ld + i] = winner;
    }
}

// ---- merge

// Members of every winner, and which winners are merged rows. One piece. Shared: [SC_THREADS].
SC_DEVICE void pass_count(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, at = h * m.ld;
    const pass_kv s = pass_kv_of(m, x, h);
    SC_GLOBAL const int * winner = w.winner + at;
    SC_SHARED int * buf = (SC_SHARED int *) sh;
    int n_merged = 0, n_kept = 0, n_lost[2] = { 0, 0 };
    for (int i0 = 0; i0 < s.n_cand; i0 += SC_THREADS) {
        const int i = i0 + (int) t.id;
        int count = 0, total;
        if (i < s.n_cand && winner[i] == i) {
            int begin, end;
            pass_chunk(w.chunk + at, s.n_cand, i, begin, end);
            for (int j = begin; j < end; ++j) {
                count += winner[j] == i;
            }
        }
        if (i < s.n_cand && winner[i] != i) {
            ++n_lost[winner[i] == SC_DROPPED];
        }
        const int merged = sc_block_scan(t, count > 1, buf, total) + n_merged;
        n_merged += total;
        const int kept = sc_block_scan(t, count > 0, buf, total) + n_kept;
        n_kept += total;
        if (i < s.n_cand) {
            w.count[at + i] = count;
            w.stays[at + i] = count > 0 ? 1 + kept : 0;
            if (count > 1) {
                w.place[at + i] = merged;
                w.first[h * m.n_merged + merged] = i;
            }
        }
    }
    for (int k = 0; k < 2; ++k) {
        int total;
        sc_block_scan(t, n_lost[k], buf, total);
        if (t.id == 0) {
            w.n[4 * h + (k == 0 ? N_GONE_MERGED : N_GONE_DROPPED)] = total;
        }
    }
    if (t.id == 0) {
        w.n[4 * h + N_MERGED] = n_merged;
        w.n[4 * h + N_KEPT] = n_kept;
    }
}

// Means of the clusters, weighted by attention. Pieces: merged rows.
SC_DEVICE void pass_merge(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w) {
    const int h = (int) t.y, at = h * m.ld, j = (int) t.x;
    if (j >= w.n[4 * h + N_MERGED]) {
        return;
    }
    const pass_kv s = pass_kv_of(m, x, h);
    const int first = w.first[h * m.n_merged + j];
    SC_GLOBAL const int * winner = w.winner + at;
    int begin, end, n_tok = 0;
    pass_chunk(w.chunk + at, s.n_cand, first, begin, end);
    float weight = 0.0f;
    for (int i = begin; i < end; ++i) {
        if (winner[i] == first) {
            weight += w.w[at + i];
            n_tok += w.n_tok[at + i];
        }
    }
    const float inv = 1.0f / weight;
    for (int e = (int) t.id; e < m.d_k + m.d_v; e += SC_THREADS) {
        float sum = 0.0f;
        for (int i = begin; i < end; ++i) {
            if (winner[i] == first) {
                const sc_i64 row = at + i;
                sum += w.w[row] * (e < m.d_k ? w.k[row * m.d_k + e] : w.v[row * m.d_v + e - m.d_k]);
            }
        }
        const sc_i64 to = h * m.n_merged + j;
        if (e < m.d_k) {
            w.mk[to * m.d_k + e] = sum * inv;
        } else {
            w.mv[to * m.d_v + e - m.d_k] = sum * inv;
        }
    }
    sc_sync(t); // all have read n_tok
    if (t.id == 0) {
        w.n_tok[at + first] = n_tok;
        w.m_bias[h * m.n_merged + j] = sc_log((float) n_tok);
    }
}

// ---- fit

// What the members of each merged row get from each fitted query, and what all gone rows get. A piece for every query.
// Shared: [SC_THREADS].
SC_DEVICE void pass_mass(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, at = h * m.ld, n_fit = pass_n_fit(m), n_merged = w.n[4 * h + N_MERGED];
    const pass_kv s = pass_kv_of(m, x, h);
    SC_GLOBAL const float * p = w.p + ((sc_i64) h * pass_n_query(m) + t.x) * m.ld;
    SC_GLOBAL const int * winner = w.winner + at;
    for (int j = (int) t.id; j < n_merged; j += SC_THREADS) {
        const int first = w.first[h * m.n_merged + j];
        int begin, end;
        pass_chunk(w.chunk + at, s.n_cand, first, begin, end);
        float sum = 0.0f;
        for (int i = begin; i < end; ++i) {
            sum += winner[i] == first ? p[i] : 0.0f;
        }
        w.mass[((sc_i64) h * n_fit + t.x) * m.n_merged + j] = sum;
    }
    float gone = 0.0f;
    for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
        gone += w.count[at + i] == 1 ? 0.0f : p[i];
    }
    gone = sc_block_sum(t, gone, (SC_SHARED float *) sh);
    if (t.id == 0) {
        w.share[(sc_i64) h * n_fit + t.x] = gone;
    }
}

// What the gone rows give. Pieces: tiles of [n_fit, d_v].
SC_DEVICE void pass_gone(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_fit = pass_n_fit(m);
    const pass_kv s = pass_kv_of(m, x, h);
    sc_gemm(t, w.p + (sc_i64) h * pass_n_query(m) * m.ld, m.ld, false, w.v + (sc_i64) h * m.ld * m.d_v, m.d_v, false,
        w.r + (sc_i64) h * n_fit * m.d_v, m.d_v, n_fit, m.d_v, s.n_cand, false, w.count + h * m.ld, sh);
}

// Logits of the merged rows. Pieces: tiles of [n_fit, n_merged].
SC_DEVICE void pass_merged_logits(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_fit = pass_n_fit(m);
    sc_gemm(t, w.q + (sc_i64) h * pass_n_query(m) * m.d_k, m.d_k, false, w.mk + (sc_i64) h * m.n_merged * m.d_k, m.d_k,
        true, w.shares + (sc_i64) h * n_fit * m.n_merged, m.n_merged, n_fit, w.n[4 * h + N_MERGED], m.d_k, false, 0,
        sh);
}

// Biases of the merged rows. Pieces of SC_THREADS of them.
SC_DEVICE void pass_fit_bias(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w) {
    const int h = (int) t.y, j = (int) (t.x * SC_THREADS + t.id), n_fit = pass_n_fit(m);
    if (j >= w.n[4 * h + N_MERGED]) {
        return;
    }
    float sum = 0.0f;
    for (int r = 0; r < n_fit; ++r) {
        const sc_i64 at = ((sc_i64) h * n_fit + r) * m.n_merged + j;
        sum += sc_log(sc_max(w.mass[at], 1e-20f)) -
               (sc_capped(w.shares[at], m.softcap) - w.z[(sc_i64) h * pass_n_query(m) + r]);
    }
    sum /= (float) n_fit;
    w.m_bias[h * m.n_merged + j] = sum < -6.0f ? -6.0f : sum > 8.0f ? 8.0f : sum;
}

// The equations, but for what the merged rows give. A piece for every fitted query. Shared: [SC_THREADS].
SC_DEVICE void pass_equations(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_fit = pass_n_fit(m), n_merged = w.n[4 * h + N_MERGED];
    const sc_i64 at = (sc_i64) h * n_fit + t.x;
    SC_GLOBAL float *y = w.shares + at * m.n_merged, *r = w.r + at * m.d_v;
    const float z = w.z[(sc_i64) h * pass_n_query(m) + t.x];
    float sum = 0.0f;
    for (int j = (int) t.id; j < n_merged; j += SC_THREADS) {
        const float p = sc_exp(sc_capped(y[j], m.softcap) + w.m_bias[h * m.n_merged + j] - z);
        y[j] = p;
        sum += p;
    }
    const float kept = 1.0f - w.share[at] + sc_block_sum(t, sum, (SC_SHARED float *) sh);
    const bool none = kept < 1e-3f; // nothing that stays could answer this query
    const float inv = none ? 0.0f : 1.0f / kept;
    for (int j = (int) t.id; j < n_merged; j += SC_THREADS) {
        y[j] *= -inv;
    }
    for (int e = (int) t.id; e < m.d_v; e += SC_THREADS) {
        r[e] = none ? 0.0f : (1.0f - inv) * w.out[h * m.d_v + e] + inv * r[e];
    }
}

// Pieces: tiles of [n_fit, d_v].
SC_DEVICE void pass_missing(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_fit = pass_n_fit(m);
    sc_gemm(t, w.shares + (sc_i64) h * n_fit * m.n_merged, m.n_merged, false, w.mv + (sc_i64) h * m.n_merged * m.d_v,
        m.d_v, false, w.r + (sc_i64) h * n_fit * m.d_v, m.d_v, n_fit, m.d_v, w.n[4 * h + N_MERGED], true, 0, sh);
}

// Pieces: tiles of [n_merged, n_merged], then of [n_merged, d_v].
SC_DEVICE void pass_normal(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_fit = pass_n_fit(m), n = w.n[4 * h + N_MERGED];
    SC_GLOBAL const float * y = w.shares + (sc_i64) h * n_fit * m.n_merged;
    sc_gemm(t, y, m.n_merged, true, y, m.n_merged, false, w.normal + (sc_i64) h * m.n_merged * m.n_merged, m.n_merged,
        n, n, n_fit, false, 0, sh);
}
SC_DEVICE void pass_move(
    SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, n_fit = pass_n_fit(m), n = w.n[4 * h + N_MERGED];
    sc_gemm(t, w.shares + (sc_i64) h * n_fit * m.n_merged, m.n_merged, true, w.r + (sc_i64) h * n_fit * m.d_v, m.d_v,
        false, w.move + (sc_i64) h * m.n_merged * m.d_v, m.d_v, n, m.d_v, n_fit, false, 0, sh);
}

// Ridge regression by Cholesky's factors, and the values that move by it. One piece. Shared: [SC_THREADS].
SC_DEVICE void pass_solve(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, at = h * m.ld, n_fit = pass_n_fit(m), n = w.n[4 * h + N_MERGED], ld = m.n_merged;
    const pass_kv s = pass_kv_of(m, x, h);
    SC_SHARED float * buf = (SC_SHARED float *) sh;
    float missing = 0.0f, scatter = 0.0f, members = 0.0f;
    for (int i = (int) t.id; i < n_fit * m.d_v; i += SC_THREADS) {
        const float y = w.r[(sc_i64) h * n_fit * m.d_v + i];
        missing += y * y;
    }
    for (int i = (int) t.id; i < s.n_cand; i += SC_THREADS) {
        const int j = w.winner[at + i];
        if (j != SC_DROPPED && w.count[at + j] > 1) {
            const sc_i64 to = h * m.n_merged + w.place[at + j];
            for (int e = 0; e < m.d_v; ++e) {
                const float y = w.v[(sc_i64) (at + i) * m.d_v + e] - w.mv[to * m.d_v + e];
                scatter += y * y;
            }
            members += 1.0f;
        }
    }
    missing = sc_block_sum(t, missing, buf) / (float) n_fit;
    scatter = sc_block_sum(t, scatter, buf);
    members = sc_block_sum(t, members, buf);
    const float ridge = 10.0f * missing / (scatter / members);
    if (sc_is_nan(ridge) || ridge <= 0.0f || ridge >= SC_HUGE) {
        return; // nothing is missing, or the members are all alike
    }
    SC_GLOBAL float *a = w.normal + (sc_i64) h * ld * ld, *b = w.move + (sc_i64) h * ld * m.d_v;
    for (int j = 0; j < n; ++j) { // column by column; what is left of it stands below and on the diagonal
        const float pivot = sc_sqrt(sc_max(a[(sc_i64) j * ld + j], 0.0f) + ridge);
        sc_sync(t);
        for (int i = j + (int) t.id; i < n; i += SC_THREADS) {
            a[(sc_i64) i * ld + j] = i == j ? pivot : a[(sc_i64) i * ld + j] / pivot;
        }
        sc_sync(t);
        const int left = n - j - 1;
        for (int i = (int) t.id; i < left * left; i += SC_THREADS) {
            const int r = j + 1 + i / left, c = j + 1 + i % left;
            if (c <= r) {
                a[(sc_i64) r * ld + c] -= a[(sc_i64) r * ld + j] * a[(sc_i64) c * ld + j];
            }
        }
        sc_sync(t);
    }
    for (int e = (int) t.id; e < m.d_v; e += SC_THREADS) {
        for (int i = 0; i < n; ++i) {
            float y = b[(sc_i64) i * m.d_v + e];
            for (int j = 0; j < i; ++j) {
                y -= a[(sc_i64) i * ld + j] * b[(sc_i64) j * m.d_v + e];
            }
            b[(sc_i64) i * m.d_v + e] = y / a[(sc_i64) i * ld + i];
        }
        for (int i = n - 1; i >= 0; --i) {
            float y = b[(sc_i64) i * m.d_v + e];
            for (int j = i + 1; j < n; ++j) {
                y -= a[(sc_i64) j * ld + i] * b[(sc_i64) j * m.d_v + e];
            }
            y /= a[(sc_i64) i * ld + i];
            b[(sc_i64) i * m.d_v + e] = y;
            w.mv[((sc_i64) h * ld + i) * m.d_v + e] -= y;
        }
    }
}

// ---- compact

// Encodes 32 values of shared memory as a block, as core/sc-quant.h.
SC_DEVICE void sc_encode(int type, SC_SHARED const float * x, SC_GLOBAL uchar * b, SC_SHARED const float * nl) {
    float most = 0.0f, extreme = 0.0f;
    for (int i = 0; i < SC_Q_BLOCK; ++i) {
        const float a = x[i] < 0.0f ? -x[i] : x[i];
        if (a > most) {
            most = a;
            extreme = x[i];
        }
    }
    if (type == SC_Q8_0) {
        const float d = most / 127.0f, inv = d > 0.0f ? 1.0f / d : 0.0f;
        sc_put16(b, sc_h2bits(sc_f2h(d)));
        for (int i = 0; i < SC_Q_BLOCK; ++i) {
            b[2 + i] = (uchar) (int) sc_round(x[i] * inv);
        }
        return;
    }
    if (type == SC_IQ4_NL) {
        float best = -1.0f, d = 0.0f, best_inv = 0.0f;
        for (int to = -151; to <= -103 && extreme != 0.0f; to += 8) {
            const float inv = (float) to / extreme;
            float xy = 0.0f, yy = 0.0f;
            for (int i = 0; i < SC_Q_BLOCK; ++i) {
                const float y = nl[sc_nearest_nl(x[i] * inv, nl)];
                xy += x[i] * y;
                yy += y * y;
            }
            const float gain = xy * xy / yy;
            if (gain > best) {
                best = gain;
                d = xy / yy;
                best_inv = inv;
            }
        }
        sc_put16(b, sc_h2bits(sc_f2h(d)));
        for (int i = 0; i < SC_Q_BLOCK / 2; ++i) {
            const int lo = extreme != 0.0f ? sc_nearest_nl(x[i] * best_inv, nl) : 0;
            const int hi = extreme != 0.0f ? sc_nearest_nl(x[i + 16] * best_inv, nl) : 0;
            b[2 + i] = (uchar) (lo | hi << 4);
        }
        return;
    }
    const float half_range = type == SC_Q5_0 ? 16.0f : 8.0f, top = 2.0f * half_range - 1.0f;
    const float d = extreme / -half_range, inv = d != 0.0f ? 1.0f / d : 0.0f;
    sc_put16(b, sc_h2bits(sc_f2h(d)));
    uint high = 0;
    SC_GLOBAL uchar * qs = b + (type == SC_Q5_0 ? 6 : 2);
    for (int i = 0; i < SC_Q_BLOCK / 2; ++i) {
        const float a = x[i] * inv + half_range + 0.5f, c = x[i + 16] * inv + half_range + 0.5f;
        const uint lo = (uint) (int) (a < top ? a : top), hi = (uint) (int) (c < top ? c : top);
        qs[i] = (uchar) ((lo & 15u) | (hi & 15u) << 4);
        high |= (lo >> 4) << i | (hi >> 4) << (i + 16);
    }
    if (type == SC_Q5_0) {
        sc_put16(b + 2, high & 0xffffu);
        sc_put16(b + 4, high >> 16);
    }
}

// Rows as they will be, to the side. Pieces of SC_ROWS candidates. Shared as for loading.
SC_DEVICE void pass_store(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, i0 = (int) t.x * SC_ROWS, at = h * m.ld, d_most = m.d_k > m.d_v ? m.d_k : m.d_v;
    const pass_kv s = pass_kv_of(m, x, h);
    const int n = s.n_cand - i0 < SC_ROWS ? s.n_cand - i0 : SC_ROWS;
    if (n <= 0) {
        return;
    }
    SC_SHARED float *y = (SC_SHARED float *) sh, *nl = y + SC_ROWS * d_most;
    SC_SHARED int *rotated = (SC_SHARED int *) (nl + 16), *fresh = rotated + SC_ROWS;
    SC_GLOBAL const sc_half *mean = x.heads + s.ih * pass_head_size(m), *scale = mean + m.d_k;
    sc_iq4_nl_table(t, nl);
    for (int kind = 0; kind < 2; ++kind) {
        const bool keys = kind == 0;
        const int d = keys ? m.d_k : m.d_v, type = keys ? m.k_type : m.v_type;
        const sc_i64 size = sc_row_size(type, d);
        SC_GLOBAL uchar * to = (keys ? w.new_k : w.new_v) + (sc_i64) at * size;
        for (int r = (int) t.id; r < SC_ROWS; r += SC_THREADS) {
            const int i = i0 + r;
            // rows that were cores and stay alone keep their bytes
            fresh[r] = r < n && w.stays[at + i] && (i >= s.n_core || w.count[at + i] > 1);
            rotated[r] = fresh[r] && type != SC_F16;
        }
        sc_sync(t);
        for (int k = (int) t.id; k < n * d; k += SC_THREADS) {
            const int r = k / d, e = k % d, i = i0 + r;
            float z = 0.0f;
            if (fresh[r]) {
                const sc_i64 row = w.count[at + i] > 1 ? (sc_i64) h * m.n_merged + w.place[at + i] : at + i;
                z = w.count[at + i] > 1 ? (keys ? w.mk : w.mv)[row * d + e] : (keys ? w.k : w.v)[row * d + e];
                if (keys && type != SC_F16) {
                    z = (z - sc_h2f(mean[e])) / sc_h2f(scale[e]);
                }
            }
            y[k] = z;
        }
        sc_sync(t);
        sc_rotate(t, y, n, d, rotated);
        const int n_block = type == SC_F16 ? 1 : d / SC_Q_BLOCK;
        for (int k = (int) t.id; k < n * n_block; k += SC_THREADS) {
            const int r = k / n_block, b = k % n_block, i = i0 + r;
            if (!w.stays[at + i]) {
                continue;
            }
            SC_GLOBAL uchar * row = to + (w.stays[at + i] - 1) * size;
            if (!fresh[r]) {
                SC_GLOBAL const uchar * old = (keys ? x.k : x.v) + (s.first + m.n_row_sink + i) * size;
                for (sc_i64 c = b * size / n_block; c < (b + 1) * size / n_block; c += 2) {
                    sc_put16(row + c, sc_u16(old + c));
                }
            } else if (type == SC_F16) {
                for (int e = 0; e < d; ++e) {
                    sc_put16(row + 2 * e, sc_h2bits(sc_f2h(y[r * d + e])));
                }
            } else {
                sc_encode(type, y + r * d + b * SC_Q_BLOCK, row + b * sc_block_size(type), nl);
            }
        }
        sc_sync(t);
    }
    for (int r = (int) t.id; r < n; r += SC_THREADS) {
        const int i = i0 + r;
        if (w.stays[at + i]) {
            const int to = at + w.stays[at + i] - 1;
            const float bias = w.count[at + i] > 1 ? w.m_bias[h * m.n_merged + w.place[at + i]] : w.bias[at + i];
            w.new_bias[to] = sc_f2h(i < s.n_core || w.count[at + i] > 1 ? bias : 0.0f);
            w.new_s_use[to] = sc_f2h(w.s_use[at + i]);
            w.new_origin[to] = (int) ((uint) w.chunk[at + i] << 8 | (uint) w.n_tok[at + i]);
        }
    }
}

// New sinks go to the head's f16, rotated as the stage's keys are. One piece. Shared as for loading.
SC_DEVICE void pass_store_sinks(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    const int h = (int) t.y, d_most = m.d_k > m.d_v ? m.d_k : m.d_v;
    const pass_kv s = pass_kv_of(m, x, h);
    SC_SHARED float * y = (SC_SHARED float *) sh;
    SC_SHARED int * flag = (SC_SHARED int *) (y + SC_ROWS * d_most);
    SC_GLOBAL sc_half * k = x.heads + s.ih * pass_head_size(m) + 2 * m.d_k;
    SC_GLOBAL sc_half * v = k + m.n_sink_max * m.d_k;
    for (int i0 = 0; i0 < m.n_sink; i0 += SC_ROWS) {
        const int n = m.n_sink - i0 < SC_ROWS ? m.n_sink - i0 : SC_ROWS;
        const sc_i64 row = (sc_i64) h * m.ld + s.n_cand + m.n_row_sink + i0;
        for (int i = (int) t.id; i < n * m.d_k; i += SC_THREADS) {
            y[i] = w.k[row * m.d_k + i];
        }
        for (int r = (int) t.id; r < SC_ROWS; r += SC_THREADS) {
            flag[r] = m.k_rotated;
        }
        sc_sync(t);
        sc_rotate(t, y, n, m.d_k, flag);
        for (int i = (int) t.id; i < n * m.d_k; i += SC_THREADS) {
            k[i0 * m.d_k + i] = sc_f2h(y[i]);
        }
        for (int i = (int) t.id; i < n * m.d_v; i += SC_THREADS) {
            v[i0 * m.d_v + i] = sc_f2h(w.v[row * m.d_v + i]);
        }
        sc_sync(t);
    }
}

// The new rows into their places, behind the sinks'. Pieces of SC_THREADS rows; the last kernel sets the counts, which
// all others read.
SC_DEVICE void pass_replace(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w) {
    const int h = (int) t.y, i0 = (int) (t.x * SC_THREADS), at = h * m.ld, n_kept = w.n[4 * h + N_KEPT];
    const int n = n_kept - i0 < SC_THREADS ? n_kept - i0 : SC_THREADS;
    if (n <= 0) {
        return;
    }
    const sc_i64 to = x.rows[m.first_head + h] + m.n_row_sink + m.n_sink + i0;
    const sc_i64 k_size = sc_row_size(m.k_type, m.d_k), v_size = sc_row_size(m.v_type, m.d_v);
    for (sc_i64 c = 2 * t.id; c < n * k_size; c += 2 * SC_THREADS) {
        sc_put16(x.k + to * k_size + c, sc_u16(w.new_k + (at + i0) * k_size + c));
    }
    for (sc_i64 c = 2 * t.id; c < n * v_size; c += 2 * SC_THREADS) {
        sc_put16(x.v + to * v_size + c, sc_u16(w.new_v + (at + i0) * v_size + c));
    }
    for (int i = (int) t.id; i < n; i += SC_THREADS) {
        x.bias[to + i] = w.new_bias[at + i0 + i];
        x.s_use[to + i] = w.new_s_use[at + i0 + i];
        x.origin[to + i] = w.new_origin[at + i0 + i];
    }
}

SC_DEVICE void pass_set_counts(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w) {
    if (t.id == 0) {
        x.rows[m.n_head_kv + m.first_head + t.y] = m.n_row_sink + m.n_sink + w.n[4 * t.y + N_KEPT];
    }
}

// ---- all of them, in order

template <int STEP>
SC_DEVICE void pass_step(SC_THREAD const sc_tid & t, SC_CONST const pass_dims & m, SC_THREAD const pass_data & x,
    SC_THREAD const pass_work & w, SC_SHARED uchar * sh) {
    switch (STEP) {
        case PASS_LOAD: pass_load(t, m, x, w, sh); break;
        case PASS_FRAME: pass_frame(t, m, x, w, sh); break;
        case PASS_QUERIES: pass_queries(t, m, x, w, sh); break;
        case PASS_LOGITS: pass_logits(t, m, x, w, sh); break;
        case PASS_SHARES: pass_shares(t, m, x, w, sh); break;
        case PASS_SCORE: pass_score(t, m, x, w); break;
        case PASS_OUTPUT: pass_output(t, m, x, w, sh); break;
        case PASS_DISTANCES: pass_distances(t, m, x, w, sh); break;
        case PASS_CHOOSE: pass_choose(t, m, x, w, sh); break;
        case PASS_METRIC: pass_metric(t, m, w, sh); break;
        case PASS_KEY_METRIC: pass_key_metric(t, m, x, w, sh); break;
        case PASS_ASSIGN: pass_assign(t, m, x, w); break;
        case PASS_COUNT: pass_count(t, m, x, w, sh); break;
        case PASS_MERGE: pass_merge(t, m, x, w); break;
        case PASS_MASS: pass_mass(t, m, x, w, sh); break;
        case PASS_GONE: pass_gone(t, m, x, w, sh); break;
        case PASS_MERGED_LOGITS: pass_merged_logits(t, m, w, sh); break;
        case PASS_FIT_BIAS: pass_fit_bias(t, m, w); break;
        case PASS_EQUATIONS: pass_equations(t, m, w, sh); break;
        case PASS_MISSING: pass_missing(t, m, w, sh); break;
        case PASS_NORMAL: pass_normal(t, m, w, sh); break;
        case PASS_MOVE: pass_move(t, m, w, sh); break;
        case PASS_SOLVE: pass_solve(t, m, x, w, sh); break;
        case PASS_STORE_SINKS: pass_store_sinks(t, m, x, w, sh); break;
        case PASS_STORE: pass_store(t, m, x, w, sh); break;
        case PASS_REPLACE: pass_replace(t, m, x, w); break;
        case PASS_SET_COUNTS: pass_set_counts(t, m, x, w); break;
    }
}

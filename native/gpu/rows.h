// rows.h - rows of the cache on a device: into a tile of f16 in shared memory, and rotated

#pragma once

#include "row-size.h"
#include "sc-gpu.h"

// What the codes of IQ4_NL stand for, nl [16]; a barrier has to follow.
SC_DEVICE void sc_iq4_nl_table(SC_THREAD const sc_tid & t, SC_SHARED float * nl) {
    const int values[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    for (int i = (int) t.id; i < 16; i += SC_THREADS) {
        nl[i] = (float) values[i];
    }
}

// Blocks begin at even addresses.
SC_DEVICE uint sc_u16(SC_GLOBAL const uchar * p) { return *(SC_GLOBAL const ushort *) p; }
SC_DEVICE uint sc_u32(SC_GLOBAL const uchar * p) { return sc_u16(p) | sc_u16(p + 2) << 16; }

SC_DEVICE int sc_i8(uint x) { return (int) (x ^ 128u) - 128; }

SC_DEVICE void sc_put16(SC_GLOBAL uchar * p, uint x) { *(SC_GLOBAL ushort *) p = (ushort) x; }

// The e-th value of a row as it is stored.
SC_DEVICE float sc_value_at(int type, SC_GLOBAL const uchar * row, int e, SC_SHARED const float * nl) {
    if (type == SC_F16) {
        return sc_h2f(sc_bits2h((ushort) sc_u16(row + 2 * e)));
    }
    SC_GLOBAL const uchar * b = row + e / SC_Q_BLOCK * sc_block_size(type);
    const int i = e % SC_Q_BLOCK;
    const float d = sc_h2f(sc_bits2h((ushort) sc_u16(b)));
    if (type == SC_Q8_0) {
        return d * (float) sc_i8(b[2 + i]);
    }
    const uint byte = b[(type == SC_Q5_0 ? 6 : 2) + i % 16], code = i < 16 ? byte & 15u : byte >> 4;
    if (type == SC_Q5_0) {
        return d * (float) ((int) (code | (sc_u32(b + 2) >> i & 1u) << 4) - 16);
    }
    return d * (type == SC_IQ4_NL ? nl[code] : (float) ((int) code - 8));
}

// The code of IQ4_NL that is nearest: the borders are half way between its values.
SC_DEVICE int sc_nearest_nl(float x, SC_SHARED const float * nl) {
    int code = 0;
    for (int c = 1; c < 16; ++c) {
        code = x > 0.5f * (nl[c - 1] + nl[c]) ? c : code;
    }
    return code;
}

// Eight values of a block of 32, the j-th of four such shares, to their places in y [32].
SC_DEVICE void sc_decode(
    int type, SC_GLOBAL const uchar * b, int j, SC_SHARED const float * nl, SC_SHARED sc_half * y) {
    if (type == SC_F16) {
        SC_UNROLL
        for (int i = 0; i < 8; ++i) {
            y[8 * j + i] = sc_bits2h((ushort) sc_u16(b + 2 * (8 * j + i)));
        }
        return;
    }
    const float d = sc_h2f(sc_bits2h((ushort) sc_u16(b)));
    if (type == SC_Q8_0) {
        SC_UNROLL
        for (int i = 0; i < 8; i += 2) {
            const uint w = sc_u16(b + 2 + 8 * j + i);
            y[8 * j + i] = sc_f2h(d * (float) sc_i8(w & 255u));
            y[8 * j + i + 1] = sc_f2h(d * (float) sc_i8(w >> 8));
        }
        return;
    }
    // the low halves of four bytes are values 4j.., the high ones 16 + 4j..
    const uint high = type == SC_Q5_0 ? sc_u32(b + 2) : 0u;
    const uint w = sc_u32(b + (type == SC_Q5_0 ? 6 : 2) + 4 * j);
    SC_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int at = i % 4 + i / 4 * 16 + 4 * j;
        const uint code = w >> (8 * (i % 4) + 4 * (i / 4)) & 15u;
        const float v = type == SC_IQ4_NL ? nl[code]
                        : type == SC_Q4_0 ? (float) ((int) code - 8)
                                          : (float) ((int) (code | (high >> at & 1u) << 4) - 16);
        y[at] = sc_f2h(d * v);
    }
}

// n rows of D values of a type, `stride` bytes apart, into a tile, LD apart; the last block of f16 rows may be cut
// short.
template <int D, int LD>
SC_DEVICE void sc_load_tile(SC_THREAD const sc_tid & t, int type, SC_GLOBAL const uchar * from, sc_i64 stride, int n,
    SC_SHARED const float * nl, SC_SHARED sc_half * tile) {
    const int n_share = D / 8;
    for (int i = (int) t.id; i < n * n_share; i += SC_THREADS) {
        const int r = i / n_share, s = i % n_share, block = s / 4;
        sc_decode(type, from + r * stride + block * sc_block_size(type), s % 4, nl, tile + r * LD + block * SC_Q_BLOCK);
    }
}

// Walsh-Hadamard transform of n rows of d values in shared memory, or of those whose flag is set, in blocks of the
// largest power of two that divides d, as hadamard() of core/sc-quant.h; ends with a barrier.
SC_DEVICE void sc_rotate(SC_THREAD const sc_tid & t, SC_SHARED float * x, int n, int d, SC_SHARED const int * flag) {
    const int size = d & -d;
    for (int h = 1; h < size; h *= 2) {
        for (int i = (int) t.id; i < n * d / 2; i += SC_THREADS) {
            const int at = i / h * 2 * h + i % h;
            if (!flag || flag[at / d]) {
                const float a = x[at], b = x[at + h];
                x[at] = a + b;
                x[at + h] = a - b;
            }
        }
        sc_sync(t);
    }
    const float scale = sc_rsqrt((float) size);
    for (int i = (int) t.id; i < n * d; i += SC_THREADS) {
        x[i] *= !flag || flag[i / d] ? scale : 1.0f;
    }
    sc_sync(t);
}

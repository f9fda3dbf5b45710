// mma.h - products of 16x16 and 16x8 halves in float32, by a warp: CUDA's mma.sync, and for tests the CPU
//
// A warp holds a matrix in pieces of its lanes. Lane l holds of A [16, 16] rows l/4 and l/4 + 8, of B [16, 8] column
// l/4, of C [16, 8] rows l/4 and l/4 + 8, and of each the columns, or of B the rows, 2*(l%4), 2*(l%4) + 1 and, of A and
// B, those 8 further (PTX ISA, "Matrix Fragments for mma.m16n8k16").

#pragma once

#include "sc-gpu.h"

// Two halves in a register, the first in its low bits.
struct sc_frag_a {
    uint x[4]; // rows l/4 and l/4 + 8, then the same of columns 8 further
};
struct sc_frag_b {
    uint x[2];
};
struct sc_frag_c {
    float x[4]; // row l/4, then l/4 + 8
};

SC_DEVICE uint sc_half2(float low, float high) {
    return (uint) sc_h2bits(sc_f2h(low)) | (uint) sc_h2bits(sc_f2h(high)) << 16;
}
// Halves at an even place.
SC_DEVICE uint sc_half2_at(SC_SHARED const sc_half * p) { return *(SC_SHARED const uint *) p; }

// A of a matrix in rows, ld apart.
SC_DEVICE sc_frag_a sc_load_a(SC_THREAD const sc_tid & t, SC_SHARED const sc_half * m, int ld) {
    SC_SHARED const sc_half * p = m + (int) (t.lane / 4) * ld + 2 * (int) (t.lane % 4);
    return { { sc_half2_at(p), sc_half2_at(p + 8 * ld), sc_half2_at(p + 8), sc_half2_at(p + 8 * ld + 8) } };
}

// B whose columns are rows of a matrix, ld apart.
SC_DEVICE sc_frag_b sc_load_b_transposed(SC_THREAD const sc_tid & t, SC_SHARED const sc_half * m, int ld) {
    SC_SHARED const sc_half * p = m + (int) (t.lane / 4) * ld + 2 * (int) (t.lane % 4);
    return { { sc_half2_at(p), sc_half2_at(p + 8) } };
}

#if defined(__CUDACC__)

// B of a matrix in rows, ld apart; these begin at multiples of 16 bytes.
SC_DEVICE sc_frag_b sc_load_b(const sc_tid & t, const sc_half * m, int ld) {
    sc_frag_b b;
    const uint at = (uint) __cvta_generic_to_shared(m + (int) (t.lane % 16) * ld);
    #if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(b.x[0]), "=r"(b.x[1])
        : "r"(at)
        : "memory");
    #else
    b.x[0] = b.x[1] = at; // not called: see has_mma() of the device
    #endif
    return b;
}

// C += A B
SC_DEVICE void sc_mma(const sc_tid &, sc_frag_c & c, const sc_frag_a & a, const sc_frag_b & b) {
    #if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
    #elif __CUDA_ARCH__ >= 750
    SC_UNROLL
    for (int i = 0; i < 2; ++i) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
            : "r"(a.x[2 * i]), "r"(a.x[2 * i + 1]), "r"(b.x[i]));
    }
    #endif
}

#else

SC_DEVICE sc_frag_b sc_load_b(const sc_tid & t, const sc_half * m, int ld) {
    const sc_half * p = m + 2 * (int) (t.lane % 4) * ld + (int) (t.lane / 4);
    return { { (uint) p[0] | (uint) p[ld] << 16, (uint) p[8 * ld] | (uint) p[9 * ld] << 16 } };
}

SC_DEVICE void sc_mma(const sc_tid & t, sc_frag_c & c, const sc_frag_a & a, const sc_frag_b & b) {
    float rows[2][16], columns[2][16];
    sc_cpu::exchange(t, a, [&](int lane, const sc_frag_a & x) {
        for (int i = 0; i < 4 && (uint) lane / 4 == t.lane / 4; ++i) {
            for (int j = 0; j < 2; ++j) {
                rows[i % 2][i / 2 * 8 + lane % 4 * 2 + j] = sc_h2f((sc_half) (x.x[i] >> 16 * j));
            }
        }
    });
    sc_cpu::exchange(t, b, [&](int lane, const sc_frag_b & x) {
        const int column = lane / 4 - (int) t.lane % 4 * 2;
        for (int i = 0; i < 2 && (column == 0 || column == 1); ++i) {
            for (int j = 0; j < 2; ++j) {
                columns[column][i * 8 + lane % 4 * 2 + j] = sc_h2f((sc_half) (x.x[i] >> 16 * j));
            }
        }
    });
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
            c.x[i] += rows[i / 2][k] * columns[i % 2][k];
        }
    }
}

#endif

// sc-quant.h - rows of K and V between memory and float32
//
// A quantized row is rotated before it is stored: outlier channels, which keys have, are spread over all values of a
// block. The rotation is orthonormal and its own inverse, so q.k = (Hq).(Hk), and a weighted sum of rotated values is
// rotated back once.

#pragma once

#include "sc-vec.h"

#include <algorithm>
#include <cmath>

namespace semcache {

// VL eight-bit integers as floats
static inline vf i8_to_vf(const int8_t * x) {
#if defined(__AVX512F__)
    return (vf) _mm512_maskz_cvtepi32_ps(
        0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i *) x)));
#elif defined(__AVX2__)
    return (vf) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) x)));
#else
    vf y;
    for (int i = 0; i < VL; ++i) {
        y[i] = x[i];
    }
    return y;
#endif
}

// VL codes of a q4_block from `first` on, a multiple of VL, as floats
static inline vf i4_to_vf(const uint8_t * qs, int first) {
    const int at = first % (Q_BLOCK / 2), shift = first < Q_BLOCK / 2 ? 0 : 4;
#if defined(__AVX512F__)
    const __m512i w = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i *) (qs + at)));
    const __m512i c = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, w, shift), _mm512_set1_epi32(15));
    return (vf) _mm512_maskz_cvtepi32_ps(0xffff, c) - 8.0f;
#elif defined(__AVX2__)
    const __m256i w = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (qs + at)));
    return (vf) _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w, shift), _mm256_set1_epi32(15))) - 8.0f;
#else
    vf y;
    for (int i = 0; i < VL; ++i) {
        y[i] = (float) ((qs[at + i] >> shift & 15) - 8);
    }
    return y;
#endif
}

// y = d*x
static inline void i8_to_f32_row(const int8_t * x, float d, float * y, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vstore(y + i, i8_to_vf(x + i) * d);
    }
    for (; i < n; ++i) {
        y[i] = d * x[i];
    }
}

// n values of a row of blocks from `first` on
static inline void q8_0_to_f32_row(const q8_block * x, int32_t first, float * y, int32_t n) {
    for (int32_t i = 0; i < n;) {
        const q8_block & b = x[(first + i) / Q_BLOCK];
        const int32_t at = (first + i) % Q_BLOCK;
        const int32_t run = std::min(Q_BLOCK - at, n - i);
        i8_to_f32_row(b.qs + at, f16_to_f32(b.d), y + i, run);
        i += run;
    }
}

static inline void q4_0_to_f32_row(const q4_block * x, float * y, int32_t n) {
    for (int32_t i = 0; i < n; i += Q_BLOCK, ++x) {
        const float d = f16_to_f32(x->d);
        for (int j = 0; j < Q_BLOCK; j += VL) {
            vstore(y + i + j, i4_to_vf(x->qs, j) * d);
        }
    }
}

// Rounded to nearest, as ggml's quantize_row_q8_0_ref.
static inline void f32_to_q8_0_row(const float * x, q8_block * y, int32_t n) {
    for (int32_t i = 0; i < n; i += Q_BLOCK, ++y) {
        float amax = 0.0f;
        for (int j = 0; j < Q_BLOCK; ++j) {
            amax = std::max(amax, std::fabs(x[i + j]));
        }
        const float d = amax / 127.0f, inv = d > 0.0f ? 1.0f / d : 0.0f;
        y->d = f32_to_f16(d);
        for (int j = 0; j < Q_BLOCK; ++j) {
            y->qs[j] = (int8_t) std::roundf(x[i + j] * inv);
        }
    }
}

// As ggml's quantize_row_q4_0_ref: the value of greatest size becomes code 0.
static inline void f32_to_q4_0_row(const float * x, q4_block * y, int32_t n) {
    for (int32_t i = 0; i < n; i += Q_BLOCK, ++y) {
        float amax = 0.0f, max = 0.0f;
        for (int j = 0; j < Q_BLOCK; ++j) {
            if (std::fabs(x[i + j]) > amax) {
                amax = std::fabs(x[i + j]);
                max = x[i + j];
            }
        }
        const float d = max / -8.0f, inv = d != 0.0f ? 1.0f / d : 0.0f;
        y->d = f32_to_f16(d);
        auto code = [inv](float v) { return (uint8_t) std::min(15, (int) (v * inv + 8.5f)); };
        for (int j = 0; j < Q_BLOCK / 2; ++j) {
            y->qs[j] = (uint8_t) (code(x[i + j]) | code(x[i + j + Q_BLOCK / 2]) << 4);
        }
    }
}

// The Walsh-Hadamard transform of every block of the largest power of two that divides n, orthonormal; its own inverse.
static inline void hadamard(float * x, int32_t n) {
    const int32_t size = n & -n;
    int32_t h = 1;
    if (n % VL == 0) { // the steps within a vector, in registers
        for (int32_t i = 0; i < n; i += VL) {
            vf a = vbutterfly<2>(vbutterfly<1>(vload(x + i)));
            if constexpr (VL > 4) {
                a = vbutterfly<4>(a);
            }
            if constexpr (VL > 8) {
                a = vbutterfly<8>(a);
            }
            vstore(x + i, a);
        }
        h = VL;
    }
    for (; h < size; h *= 2) {
        for (int32_t i = 0; i < n; i += 2 * h) {
            int32_t j = i;
            for (; j + VL <= i + h; j += VL) {
                const vf a = vload(x + j), b = vload(x + j + h);
                vstore(x + j, a + b);
                vstore(x + j + h, a - b);
            }
            for (; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
        }
    }
    const float scale = 1.0f / std::sqrt((float) size);
    for (int32_t i = 0; i < n; ++i) {
        x[i] *= scale;
    }
}

// A row as it is stored, rotated if it is quantized.
static inline void decode_row(row_type t, const void * p, float * y, int32_t n) {
    switch (t) {
        case row_type::f16: f16_to_f32_row((const f16 *) p, y, n); break;
        case row_type::q8_0: q8_0_to_f32_row((const q8_block *) p, 0, y, n); break;
        case row_type::q4_0: q4_0_to_f32_row((const q4_block *) p, y, n); break;
    }
}

static inline void load_row(row_type t, const void * p, float * y, int32_t n) {
    decode_row(t, p, y, n);
    if (t != row_type::f16) {
        hadamard(y, n);
    }
}

// x is scratch afterwards.
static inline void store_row(row_type t, float * x, void * p, int32_t n) {
    if (t == row_type::f16) {
        f32_to_f16_row(x, (f16 *) p, n);
        return;
    }
    hadamard(x, n);
    if (t == row_type::q8_0) {
        f32_to_q8_0_row(x, (q8_block *) p, n);
    } else {
        f32_to_q4_0_row(x, (q4_block *) p, n);
    }
}

} // namespace semcache

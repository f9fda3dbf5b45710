// sc-quant.h - rows of K and V between memory and float32
//
// A quantized row is rotated before it is stored: outlier channels, which keys have, are spread over all values of a
// block. The rotation H is orthonormal and its own inverse, so q.k = (Hq).(Hk), and a weighted sum of rotated values is
// rotated back once.
//
// A quantized key is first brought into the frame of its head, k = mean + scale*H(stored), see frame.h: what all keys
// share takes no bits, and the error falls where queries do not look. Then q.k = q.mean + H(scale*q).stored.

#pragma once

#include "sc-vec.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

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

// VL codes of four bits from `first` on, a multiple of VL, as floats: code - 8, or IQ4_NL[code]
template <bool NL> static inline vf i4_to_vf(const uint8_t * qs, int first) {
    const int at = first % (Q_BLOCK / 2), shift = first < Q_BLOCK / 2 ? 0 : 4;
#if defined(__AVX512F__) || defined(__AVX2__)
    #if defined(__AVX512F__)
    const __m128i w = _mm_loadu_si128((const __m128i *) (qs + at));
    #else
    const __m128i w = _mm_loadl_epi64((const __m128i *) (qs + at));
    #endif
    const __m128i code = _mm_and_si128(shift ? _mm_srli_epi16(w, 4) : w, _mm_set1_epi8(15));
    const __m128i x =
        NL ? _mm_shuffle_epi8(_mm_load_si128((const __m128i *) IQ4_NL), code) : _mm_sub_epi8(code, _mm_set1_epi8(8));
    #if defined(__AVX512F__)
    return (vf) _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, x));
    #else
    return (vf) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
    #endif
#else
    vf y;
    for (int i = 0; i < VL; ++i) {
        const int code = qs[at + i] >> shift & 15;
        y[i] = (float) (NL ? IQ4_NL[code] : code - 8);
    }
    return y;
#endif
}

// The same of a q5_block: code - 16.
static inline vf i5_to_vf(const q5_block & b, int first) {
    uint32_t high;
    memcpy(&high, b.qh, sizeof(high));
    high >>= first;
#if defined(__AVX512F__)
    const vf five = (vf) _mm512_maskz_mov_ps((__mmask16) high, _mm512_set1_ps(16.0f));
#elif defined(__AVX2__)
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int) high), bit), bit);
    const vf five = (vf) _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(16.0f));
#else
    vf five;
    for (int i = 0; i < VL; ++i) {
        five[i] = high >> i & 1 ? 16.0f : 0.0f;
    }
#endif
    return i4_to_vf<false>(b.qs, first) + five - 8.0f;
}

// VL values of a row from e on, a multiple of VL.
template <row_type T> static inline vf load_values(const uint8_t * row, int32_t e) {
    const int32_t i = e / Q_BLOCK, at = e % Q_BLOCK;
    if constexpr (T == row_type::f16) {
        return vload_f16((const f16 *) row + e);
    } else if constexpr (T == row_type::q8_0) {
        const q8_block & b = ((const q8_block *) row)[i];
        return i8_to_vf(b.qs + at) * f16_to_f32(b.d);
    } else if constexpr (T == row_type::q5_0) {
        const q5_block & b = ((const q5_block *) row)[i];
        return i5_to_vf(b, at) * f16_to_f32(b.d);
    } else {
        const q4_block & b = ((const q4_block *) row)[i];
        return i4_to_vf<T == row_type::iq4_nl>(b.qs, at) * f16_to_f32(b.d);
    }
}

// Calls f with the type as a constant.
template <typename F> void with_type(row_type t, F && f) {
    switch (t) {
        case row_type::f16: f(std::integral_constant<row_type, row_type::f16>()); break;
        case row_type::q8_0: f(std::integral_constant<row_type, row_type::q8_0>()); break;
        case row_type::q5_0: f(std::integral_constant<row_type, row_type::q5_0>()); break;
        case row_type::q4_0: f(std::integral_constant<row_type, row_type::q4_0>()); break;
        case row_type::iq4_nl: f(std::integral_constant<row_type, row_type::iq4_nl>()); break;
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

// The value of greatest size of a block.
static inline float extreme_of(const float * x) {
    float amax = 0.0f, max = 0.0f;
    for (int j = 0; j < Q_BLOCK; ++j) {
        if (std::fabs(x[j]) > amax) {
            amax = std::fabs(x[j]);
            max = x[j];
        }
    }
    return max;
}

// As ggml's quantize_row_q4_0_ref: the value of greatest size becomes code 0.
static inline void f32_to_q4_0_row(const float * x, q4_block * y, int32_t n) {
    for (int32_t i = 0; i < n; i += Q_BLOCK, ++y) {
        const float d = extreme_of(x + i) / -8.0f, inv = d != 0.0f ? 1.0f / d : 0.0f;
        y->d = f32_to_f16(d);
        auto code = [inv](float v) { return (uint8_t) std::min(15, (int) (v * inv + 8.5f)); };
        for (int j = 0; j < Q_BLOCK / 2; ++j) {
            y->qs[j] = (uint8_t) (code(x[i + j]) | code(x[i + j + Q_BLOCK / 2]) << 4);
        }
    }
}

// As ggml's quantize_row_q5_0_ref, likewise.
static inline void f32_to_q5_0_row(const float * x, q5_block * y, int32_t n) {
    for (int32_t i = 0; i < n; i += Q_BLOCK, ++y) {
        const float d = extreme_of(x + i) / -16.0f, inv = d != 0.0f ? 1.0f / d : 0.0f;
        y->d = f32_to_f16(d);
        auto code = [inv](float v) { return (uint32_t) std::min(31, (int) (v * inv + 16.5f)); };
        uint32_t high = 0;
        for (int j = 0; j < Q_BLOCK / 2; ++j) {
            const uint32_t lo = code(x[i + j]), hi = code(x[i + j + Q_BLOCK / 2]);
            y->qs[j] = (uint8_t) ((lo & 15) | (hi & 15) << 4);
            high |= lo >> 4 << j | hi >> 4 << (j + Q_BLOCK / 2);
        }
        memcpy(y->qh, &high, sizeof(high));
    }
}

// Codes of the values of IQ4_NL nearest to x [VL]: the borders are half way between them.
static inline vf nearest_iq4_nl(vf x, vf & code) {
    vf y = vset(IQ4_NL[0]);
    code = vf{};
    for (int c = 1; c < 16; ++c) {
        const vi above = x > vset(0.5f * (float) (IQ4_NL[c - 1] + IQ4_NL[c]));
        y = above ? vset(IQ4_NL[c]) : y;
        code = above ? vset((float) c) : code;
    }
    return y;
}

// Some scales are tried, by which the value of greatest size becomes this or that, each corrected by least squares; the
// one with the least squared error is taken.
static inline void f32_to_iq4_nl_row(const float * x, q4_block * y, int32_t n) {
    for (int32_t i = 0; i < n; i += Q_BLOCK, ++y) {
        const float max = extreme_of(x + i);
        float codes[Q_BLOCK] = {}, best = -1.0f, d = 0.0f;
        for (float to = -151.0f; to <= -103.0f && max != 0.0f; to += 8.0f) {
            const float inv = to / max;
            float tried[Q_BLOCK];
            vf xy = {}, yy = {};
            for (int j = 0; j < Q_BLOCK; j += VL) {
                const vf v = vload(x + i + j);
                vf code;
                const vf z = nearest_iq4_nl(v * inv, code);
                vstore(tried + j, code);
                xy += v * z;
                yy += z * z;
            }
            const float sum_xy = vsum(xy), sum_yy = vsum(yy), gain = sum_xy * sum_xy / sum_yy;
            if (gain > best) {
                best = gain;
                d = sum_xy / sum_yy;
                std::copy_n(tried, Q_BLOCK, codes);
            }
        }
        y->d = f32_to_f16(d);
        for (int j = 0; j < Q_BLOCK / 2; ++j) {
            y->qs[j] = (uint8_t) ((int) codes[j] | (int) codes[j + Q_BLOCK / 2] << 4);
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

// n values of a row as it is stored, from `first` on; both are whole numbers of vectors or the type is f16.
static inline void decode_row(row_type t, const void * p, int32_t first, float * y, int32_t n) {
    if (t == row_type::f16) {
        f16_to_f32_row((const f16 *) p + first, y, n);
        return;
    }
    with_type(t, [&](auto type) {
        for (int32_t e = 0; e < n; e += VL) {
            vstore(y + e, load_values<decltype(type)::value>((const uint8_t *) p, first + e));
        }
    });
}

static inline void decode_row(row_type t, const void * p, float * y, int32_t n) { decode_row(t, p, 0, y, n); }

static inline void encode_row(row_type t, const float * x, void * p, int32_t n) {
    switch (t) {
        case row_type::f16: f32_to_f16_row(x, (f16 *) p, n); break;
        case row_type::q8_0: f32_to_q8_0_row(x, (q8_block *) p, n); break;
        case row_type::q5_0: f32_to_q5_0_row(x, (q5_block *) p, n); break;
        case row_type::q4_0: f32_to_q4_0_row(x, (q4_block *) p, n); break;
        case row_type::iq4_nl: f32_to_iq4_nl_row(x, (q4_block *) p, n); break;
    }
}

// A value. x is scratch after storing.
static inline void load_value(row_type t, const void * p, float * y, int32_t n) {
    decode_row(t, p, y, n);
    if (t != row_type::f16) {
        hadamard(y, n);
    }
}

static inline void store_value(row_type t, float * x, void * p, int32_t n) {
    if (t != row_type::f16) {
        hadamard(x, n);
    }
    encode_row(t, x, p, n);
}

// What quantized keys of a head have in common, [n_embd_head_k] each.
struct key_frame {
    const f16 * mean;
    const f16 * scale; // > 0
};

// A decoded key as it was.
static inline void from_frame(row_type t, const key_frame & frame, float * x, int32_t n) {
    if (t == row_type::f16) {
        return;
    }
    hadamard(x, n);
    for (int32_t i = 0; i < n; ++i) {
        x[i] = f16_to_f32(frame.mean[i]) + f16_to_f32(frame.scale[i]) * x[i];
    }
}

// A key. x is scratch after storing.
static inline void load_key(row_type t, const void * p, const key_frame & frame, float * y, int32_t n) {
    decode_row(t, p, y, n);
    from_frame(t, frame, y, n);
}

static inline void store_key(row_type t, float * x, const key_frame & frame, void * p, int32_t n) {
    for (int32_t i = 0; t != row_type::f16 && i < n; ++i) {
        x[i] = (x[i] - f16_to_f32(frame.mean[i])) / f16_to_f32(frame.scale[i]);
    }
    store_value(t, x, p, n);
}

// A query as it meets quantized keys; returns what it gives all of them alike.
static inline float frame_query(const key_frame & frame, float * q, int32_t n) {
    float with_mean = 0.0f;
    for (int32_t i = 0; i < n; ++i) {
        with_mean += q[i] * f16_to_f32(frame.mean[i]);
        q[i] *= f16_to_f32(frame.scale[i]);
    }
    hadamard(q, n);
    return with_mean;
}

// What a head has besides its rows, f16 values that lie one after the other: frame, K of the sinks, V of the sinks.
// Sinks stay in f16: most of the attention goes to them, and 4 bits of one cost more than those of all other rows
// (docs/decisions.md).
template <typename T> struct head_parts {
    T * mean;   // [n_embd_head_k]
    T * scale;  // [n_embd_head_k]
    T * k_sink; // [n_sink, n_embd_head_k]
    T * v_sink; // [n_sink, n_embd_head_v]

    // heads [n_head_kv, head_size()]
    head_parts(T * heads, int32_t ih, int64_t d_k, int64_t d_v, int64_t n_sink) :
        mean(heads + ih * head_size(d_k, d_v, n_sink)), scale(mean + d_k), k_sink(scale + d_k),
        v_sink(k_sink + n_sink * d_k) {}

    key_frame frame() const { return { mean, scale }; }
};

} // namespace semcache

// sc-vec.h - the few vector operations that the pass and the attention kernel need
//
// Written with the vector extension of GCC and Clang, so one source serves AVX-512, AVX2, SSE and NEON: the compiler
// lowers a `vf` to what the target has. Intrinsics stand where that is slow: f16, sums over lanes, e^x, 8-bit rows
// (sc-quant.h). VL depends on compiler flags, so interfaces do not include this header.

#pragma once

#include "sc-types.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__) || defined(__F16C__) || defined(__AVX512F__)
    #if defined(__GNUC__) && !defined(__clang__)
        #pragma GCC diagnostic push
        #pragma GCC diagnostic ignored "-Wuninitialized" // GCC 12's own header, GCC bug 105593
        #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
    #endif
    #include <immintrin.h>
    #if defined(__GNUC__) && !defined(__clang__)
        #pragma GCC diagnostic pop
    #endif
#endif
#if defined(__ARM_NEON) && defined(__aarch64__)
    #include <arm_neon.h>
#endif

namespace semcache {

#if defined(__AVX512F__)
constexpr int VL = 16; // floats in a vector
constexpr int MR = 12; // rows of a register tile: MR*2 accumulators, 2 operands and a broadcast fit the register file
#elif defined(__AVX__)
constexpr int VL = 8;
constexpr int MR = 6;
#else
constexpr int VL = 4;
constexpr int MR = 6;
#endif
constexpr int NR = 2 * VL; // columns of a register tile and of a packed panel

// Of any target: what lays memory out may be compiled for another one than what works in it.
constexpr int MAX_MR = 12;
constexpr int MAX_NR = 32;
static_assert(MR <= MAX_MR && MAX_NR % NR == 0, "larger tiles need larger bounds");

typedef float vf __attribute__((vector_size(VL * sizeof(float))));
typedef int32_t vi __attribute__((vector_size(VL * sizeof(int32_t))));

static inline vf vload(const float * p) {
    vf r;
    memcpy(&r, p, sizeof(r));
    return r;
}
static inline void vstore(float * p, vf x) { memcpy(p, &x, sizeof(x)); }
static inline vf vset(float x) { return x - vf{}; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }

// Sum and maximum over the lanes: in the same order wherever a target compiles it, which may be another for another
// target.
static inline float vsum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512) x);
#else
    float t[VL];
    vstore(t, x);
    for (int w = VL / 2; w > 0; w /= 2) {
        for (int i = 0; i < w; ++i) {
            t[i] += t[i + w];
        }
    }
    return t[0];
#endif
}

// Sums over the lanes of four vectors.
static inline void vsum4(vf a, vf b, vf c, vf d, float * out) {
#if defined(__AVX__)
    #if defined(__AVX512F__)
    auto half = [](vf x) {
        return _mm256_add_ps(_mm512_castps512_ps256((__m512) x),
            _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512) x), 1)));
    };
    #else
    auto half = [](vf x) { return (__m256) x; };
    #endif
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
    out[0] = vsum(a);
    out[1] = vsum(b);
    out[2] = vsum(c);
    out[3] = vsum(d);
#endif
}

static inline float vmax_lanes(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512) x);
#else
    float t[VL];
    vstore(t, x);
    for (int w = VL / 2; w > 0; w /= 2) {
        for (int i = 0; i < w; ++i) {
            t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
        }
    }
    return t[0];
#endif
}

// e^x, relative error below 3e-7; 0 for x < -87. Range reduction by ln 2 in two parts, then a Taylor polynomial of
// degree 6 on [-ln2/2, ln2/2] (last term 4e-9).
static inline vf vexp(vf x) {
#if defined(__AVX512F__)
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512) x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    x = x > 88.0f ? vset(88.0f) : x;
    const __m512 n512 =
        _mm512_maskz_roundscale_ps(0xffff, (__m512) (x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf n = (vf) n512;
#else
    const vf magic = vset(12582912.0f); // 1.5*2^23: adding it rounds to an integer, which then stands in the low bits
    const vf lo = vset(-87.0f);
    const vf hi = vset(88.0f);
    const vi under = x < lo;
    vf y = under ? lo : x;
    y = y > hi ? hi : y;
    const vf t = y * 1.44269504f + magic;
    const vf n = t - magic;
    x = y;
#endif
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = r * (1.0f / 720.0f) + (1.0f / 120.0f);
    p = p * r + (1.0f / 24.0f);
    p = p * r + (1.0f / 6.0f);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vf) _mm512_maskz_scalef_ps(keep, (__m512) p, n512); // far below -87, p itself is no number
#else
    vi bits;
    memcpy(&bits, &t, sizeof(bits));
    bits = (bits - 0x4B400000 + 127) << 23;
    vf scale;
    memcpy(&scale, &bits, sizeof(scale));
    const vf e = p * scale;
    return under ? vf{} : e;
#endif
}

// cap tanh(x/cap), by tanh(u) = 1 - 2/(e^2u + 1)
static inline vf vsoftcap(vf x, float cap) { return cap * (1.0f - 2.0f / (vexp(x * (2.0f / cap)) + 1.0f)); }

// x [n] becomes e^(x - max x); returns the sum. To the last digit of the standard library, one value at a time.
static inline float exp_all(float * x, int n) {
    float mx = -INFINITY, sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        mx = x[i] > mx ? x[i] : mx;
    }
    for (int i = 0; i < n; ++i) {
        x[i] = std::exp(x[i] - mx);
        sum += x[i];
    }
    return sum;
}

// ln x for normal x > 0, absolute error below 2e-7 near 1: exponent and mantissa in [sqrt(1/2), sqrt(2)), then
// ln m = 2 artanh((m - 1)/(m + 1)) as an odd series (last term 2e-9).
static inline vf vlog(vf x) {
    vi bits;
    memcpy(&bits, &x, sizeof(bits));
    const vi off = (bits - 0x3F3504F3) >> 23; // 0x3F3504F3 = sqrt(1/2)
    bits -= off << 23;
    vf m;
    memcpy(&m, &bits, sizeof(m));
    const vf e = __builtin_convertvector(off, vf);
    const vf s = (m - 1.0f) / (m + 1.0f);
    const vf s2 = s * s;
    vf p = s2 * (2.0f / 11.0f) + (2.0f / 9.0f);
    p = p * s2 + (2.0f / 7.0f);
    p = p * s2 + (2.0f / 5.0f);
    p = p * s2 + (2.0f / 3.0f);
    p = p * s2 + 2.0f;
    return p * s + e * 0.693147181f;
}

// Of every pair of lanes whose numbers differ in the bit H alone: their sum in the first, their difference in the
// second.
template <int H> struct pairs {
    int32_t other[VL];
    float sign[VL];

    constexpr pairs() : other(), sign() {
        for (int i = 0; i < VL; ++i) {
            other[i] = i ^ H;
            sign[i] = i & H ? -1.0f : 1.0f;
        }
    }
};

template <int H> static inline vf vbutterfly(vf x) {
    static constexpr pairs<H> of;
#if defined(__clang__)
    vf y;
    for (int i = 0; i < VL; ++i) {
        y[i] = x[i ^ H];
    }
#else
    vi other;
    memcpy(&other, of.other, sizeof(other));
    const vf y = __builtin_shuffle(x, other);
#endif
    return y + vload(of.sign) * x;
}

static inline float f16_to_f32(f16 h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16;
    const uint32_t mag = h & 0x7fff;
    uint32_t bits;
    if (mag >= 0x7c00) {
        bits = 0x7f800000 | (mag & 0x3ff) << 13;
    } else if (mag >= 0x0400) {
        bits = (mag << 13) + 0x38000000;
    } else {
        const float sub = (float) mag * 0x1p-24f;
        memcpy(&bits, &sub, sizeof(bits));
    }
    bits |= sign;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
#endif
}

static inline f16 f32_to_f16(float f) {
#if defined(__F16C__)
    return (f16) _cvtss_sh(f, 0);
#else
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t mag = bits & 0x7fffffff;
    if (mag > 0x7f800000) {
        return (f16) (sign | 0x7e00);
    }
    if (mag >= 0x477ff000) {
        return (f16) (sign | 0x7c00);
    }
    if (mag < 0x38800000) { // subnormal: let the adder round to a multiple of 2^-24
        float a;
        memcpy(&a, &mag, sizeof(a));
        a += 0.5f;
        uint32_t r;
        memcpy(&r, &a, sizeof(r));
        return (f16) (sign | (r - 0x3f000000));
    }
    const uint32_t odd = mag >> 13 & 1;
    return (f16) (sign | ((mag + 0xc8000fff + odd) >> 13));
#endif
}

static inline vf vload_f16(const f16 * p) {
#if defined(__AVX512F__)
    return (vf) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *) p));
#elif defined(__AVX__) && defined(__F16C__)
    return (vf) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
    vf r;
    for (int i = 0; i < VL; ++i) {
        r[i] = f16_to_f32(p[i]);
    }
    return r;
#endif
}

static inline void f16_to_f32_row(const f16 * x, float * y, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vstore(y + i, vload_f16(x + i));
    }
    for (; i < n; ++i) {
        y[i] = f16_to_f32(x[i]);
    }
}

static inline void f32_to_f16_row(const float * x, f16 * y, int n) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + VL <= n; i += VL) {
        _mm256_storeu_si256((__m256i *) (y + i), _mm512_maskz_cvtps_ph(0xffff, (__m512) vload(x + i), 0));
    }
#endif
    for (; i < n; ++i) {
        y[i] = f32_to_f16(x[i]);
    }
}

static inline float dot(const float * a, const float * b, int n) {
    vf acc0 = {}, acc1 = {};
    int i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        acc0 += vload(a + i) * vload(b + i);
        acc1 += vload(a + i + VL) * vload(b + i + VL);
    }
    for (; i + VL <= n; i += VL) {
        acc0 += vload(a + i) * vload(b + i);
    }
    float s = vsum(acc0 + acc1);
    for (; i < n; ++i) {
        s += a[i] * b[i];
    }
    return s;
}

// |a - b|^2
static inline float distance2(const float * a, const float * b, int n) {
    vf acc = {};
    int i = 0;
    for (; i + VL <= n; i += VL) {
        const vf d = vload(a + i) - vload(b + i);
        acc += d * d;
    }
    float s = vsum(acc);
    for (; i < n; ++i) {
        s += (a[i] - b[i]) * (a[i] - b[i]);
    }
    return s;
}

// y += a*x
static inline void axpy(float a, const float * x, float * y, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vstore(y + i, vload(y + i) + a * vload(x + i));
    }
    for (; i < n; ++i) {
        y[i] += a * x[i];
    }
}

// Register tile: c[m][0..NR) (+)= sum_k a[m*lda + k*a_k] * b[k*ldb + 0..NR) for m < M. b is a packed panel (ldb = NR)
// or rows.
template <int M>
static inline void gemm_tile(const float * a, int64_t lda, int64_t a_k, const float * b, int64_t ldb, int n_k,
    float * c, int64_t ldc, bool add) {
    vf acc0[M], acc1[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        acc0[m] = add ? vload(c + m * ldc) : vf{};
        acc1[m] = add ? vload(c + m * ldc + VL) : vf{};
    }
    for (int k = 0; k < n_k; ++k) {
        const vf b0 = vload(b + k * ldb);
        const vf b1 = vload(b + k * ldb + VL);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            const float x = a[m * lda + k * a_k];
            acc0[m] += x * b0;
            acc1[m] += x * b1;
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        vstore(c + m * ldc, acc0[m]);
        vstore(c + m * ldc + VL, acc1[m]);
    }
}

// A column of tiles: NR columns of all n_m rows.
static inline void gemm_tiles(const float * a, int64_t lda, int64_t a_k, int n_m, const float * b, int64_t ldb, int n_k,
    float * c, int64_t ldc, bool add) {
    int m = 0;
    for (; m + MR <= n_m; m += MR) {
        gemm_tile<MR>(a + m * lda, lda, a_k, b, ldb, n_k, c + m * ldc, ldc, add);
    }
    for (; m + 3 <= n_m; m += 3) {
        gemm_tile<3>(a + m * lda, lda, a_k, b, ldb, n_k, c + m * ldc, ldc, add);
    }
    for (; m < n_m; ++m) {
        gemm_tile<1>(a + m * lda, lda, a_k, b, ldb, n_k, c + m * ldc, ldc, add);
    }
}

// c[m][n] = sum_k a[m][k] * panels[n/NR][k][n%NR], n_m rows, n_n columns (a multiple of NR)
static inline void gemm_panels(
    const float * a, int64_t lda, int n_m, const float * panels, int n_k, int n_n, float * c, int64_t ldc) {
    for (int n = 0; n < n_n; n += NR) {
        gemm_tiles(a, lda, 1, n_m, panels + (int64_t) n * n_k, NR, n_k, c + n, ldc, false);
    }
}

// c[m][n] (+)= sum_k a[m][k]*b[k][n], n_m rows, n_n columns (a multiple of NR). In blocks of k whose columns of b stay
// in the L1 cache for all rows of a; the order of the sums is that of one block.
static inline void gemm_rows(const float * a, int64_t lda, int n_m, const float * b, int64_t ldb, int n_k, int n_n,
    float * c, int64_t ldc, bool add) {
    constexpr int BLOCK_K = 256;
    for (int k = 0; k < n_k || k == 0; k += BLOCK_K) {
        const int n_block = n_k - k < BLOCK_K ? n_k - k : BLOCK_K;
        for (int n = 0; n < n_n; n += NR) {
            gemm_tiles(a + k, lda, 1, n_m, b + (int64_t) k * ldb + n, ldb, n_block, c + n, ldc, add || k > 0);
        }
    }
}

// c[m][n] = sum_k a[k][m]*b[k][n], n_m rows, n_n columns (a multiple of NR)
static inline void gemm_cols(
    const float * a, int64_t lda, int n_m, const float * b, int64_t ldb, int n_k, int n_n, float * c, int64_t ldc) {
    for (int n = 0; n < n_n; n += NR) {
        gemm_tiles(a, 1, lda, n_m, b + n, ldb, n_k, c + n, ldc, false);
    }
}

// Packs n rows of n_k values into panels of NR columns; the last panel is filled up with zeros. row(i) points to row i.
template <typename F> static inline void pack_panels(F && row, int n, int n_k, float * panels) {
    for (int n0 = 0; n0 < n; n0 += NR) {
        float * p = panels + (int64_t) n0 * n_k;
        const int cols = n - n0 < NR ? n - n0 : NR;
        for (int j = 0; j < cols; ++j) {
            const float * x = row(n0 + j);
            for (int k = 0; k < n_k; ++k) {
                p[k * NR + j] = x[k];
            }
        }
        for (int j = cols; j < NR; ++j) {
            for (int k = 0; k < n_k; ++k) {
                p[k * NR + j] = 0.0f;
            }
        }
    }
}

static inline void pack_panels(const float * x, int64_t ldx, int n, int n_k, float * panels) {
    pack_panels([&](int i) { return x + i * ldx; }, n, n_k, panels);
}

static inline int64_t pad_to(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

} // namespace semcache

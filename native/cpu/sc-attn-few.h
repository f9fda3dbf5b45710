// sc-attn-few.h - products of a few query rows with rows of K and V
//
// Nothing is copied: a row is converted in registers for all query rows, 8 at a time.

#pragma once

#include "sc-quant.h"

#include <algorithm>
#include <type_traits>

namespace semcache {

// Rows of K or V of one head that lie one after the other: cores, cells of the stage or sinks.
struct row_span {
    const uint8_t * p;
    int64_t stride; // bytes
    row_type type;
    int64_t size; // bytes of a row

    const uint8_t * row(int32_t i) const { return p + i * stride; }

    // What is read next is fetched while the present rows are computed with.
    void prefetch(int32_t i) const {
        for (int64_t at = 0; at < size; at += 64) {
            __builtin_prefetch(row(i) + at);
        }
    }
};

// x[r][i] = q_r.k_i for NQ query rows and the keys i, i + 1, ... < n, NK of these at a time
template <row_type T, int NQ, int NK>
void few_logits(const float * q, int32_t d, const row_span & k, const row_span & next, int32_t i, int32_t n, float * x,
    int64_t ld_x) {
    for (; i + NK <= n; i += NK) {
        const uint8_t * row = k.row(i);
        for (int j = 0; j < NK; ++j) {
            next.prefetch(i + j);
        }
        vf acc[NQ][NK] = {};
        for (int32_t e = 0; e < d; e += VL) {
            vf key[NK];
#pragma GCC unroll 4
            for (int j = 0; j < NK; ++j) {
                key[j] = load_values<T>(row + j * k.stride, e);
            }
#pragma GCC unroll 8
            for (int r = 0; r < NQ; ++r) {
                const vf y = vload(q + (int64_t) r * d + e);
#pragma GCC unroll 4
                for (int j = 0; j < NK; ++j) {
                    acc[r][j] += y * key[j];
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < NQ; r += 4 / NK) { // four sums at a time: of one query row, two or four
            float sums[4];
            auto at = [&](int j) -> const vf & { return acc[std::min(r + j / NK, NQ - 1)][j % NK]; };
            vsum4(at(0), at(1), at(2), at(3), sums);
            for (int j = 0; j < 4 && r + j / NK < NQ; ++j) {
                x[(r + j / NK) * ld_x + i + j % NK] = sums[j];
            }
        }
    }
    if constexpr (NK > 1) {
        if (i < n) {
            few_logits<T, NQ, 1>(q, d, k, next, i, n, x, ld_x);
        }
    }
}

// o[r] += sum_i x[r][i] v_i, NV vectors of the values from e on
template <row_type T, int NQ, int NV>
void few_values(const float * x, int64_t ld_x, const row_span & v, const row_span * next, int32_t n, int32_t e,
    float * o, int64_t ld_v) {
    vf acc[NQ][NV];
#pragma GCC unroll 8
    for (int r = 0; r < NQ; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
            acc[r][j] = vload(o + r * ld_v + e + j * VL);
        }
    }
    for (int32_t i = 0; i < n; ++i) {
        if (next) {
            next->prefetch(i);
        }
        vf y[NV];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
            y[j] = load_values<T>(v.row(i), e + j * VL);
        }
#pragma GCC unroll 8
        for (int r = 0; r < NQ; ++r) {
            const float p = x[r * ld_x + i];
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) {
                acc[r][j] += p * y[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < NQ; ++r) {
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
            vstore(o + r * ld_v + e + j * VL, acc[r][j]);
        }
    }
}

// The same for all elements.
template <row_type T, int NQ>
void few_values(const float * x, int64_t ld_x, const row_span & v, const row_span * next, int32_t n, int32_t d,
    float * o, int64_t ld_v) {
    int32_t e = 0;
    for (; e + 2 * VL <= d; e += 2 * VL, next = nullptr) {
        few_values<T, NQ, 2>(x, ld_x, v, next, n, e, o, ld_v);
    }
    if (e < d) {
        few_values<T, NQ, 1>(x, ld_x, v, next, n, e, o, ld_v);
    }
}

// The same of a transposed stage: a value lies along the cells.
template <int NQ>
void few_values_along(const float * x, int64_t ld_x, const row_span & v, const row_span * next, int32_t n, int32_t d,
    float * o, int64_t ld_v) {
    constexpr int NE = NQ <= 4 ? 4 : 2;
    for (int32_t e = 0; e < d; e += NE) {
        for (int j = 0; next && j < NE; ++j) {
            next->prefetch(e + j);
        }
        vf acc[NQ][NE] = {};
        int32_t i = 0;
        for (; i + VL <= n; i += VL) {
            vf y[NE];
#pragma GCC unroll 4
            for (int j = 0; j < NE; ++j) {
                y[j] = vload_f16((const f16 *) v.row(e + j) + i);
            }
#pragma GCC unroll 8
            for (int r = 0; r < NQ; ++r) {
                const vf p = vload(x + r * ld_x + i);
#pragma GCC unroll 4
                for (int j = 0; j < NE; ++j) {
                    acc[r][j] += p * y[j];
                }
            }
        }
        for (int r = 0; r < NQ; r += 4 / NE) { // four sums at a time, as above
            float sums[4];
            auto at = [&](int j) -> const vf & { return acc[std::min(r + j / NE, NQ - 1)][j % NE]; };
            vsum4(at(0), at(1), at(2), at(3), sums);
            for (int j = 0; j < 4 && r + j / NE < NQ; ++j) {
                const float * p = x + (r + j / NE) * ld_x;
                const f16 * cell = (const f16 *) v.row(e + j % NE);
                for (int32_t k = i; k < n; ++k) {
                    sums[j] += p[k] * f16_to_f32(cell[k]);
                }
                o[(r + j / NE) * ld_v + e + j % NE] += sums[j];
            }
        }
    }
}

// f(first query row, number of them as a constant), at most 8 at a time
template <typename F> void for_queries(int32_t n_row, F && f) {
    for (int32_t r = 0; r < n_row; r += 8) {
        switch (std::min(8, n_row - r)) {
            case 1: f(r, std::integral_constant<int, 1>()); break;
            case 2: f(r, std::integral_constant<int, 2>()); break;
            case 3: f(r, std::integral_constant<int, 3>()); break;
            case 4: f(r, std::integral_constant<int, 4>()); break;
            case 5: f(r, std::integral_constant<int, 5>()); break;
            case 6: f(r, std::integral_constant<int, 6>()); break;
            case 7: f(r, std::integral_constant<int, 7>()); break;
            case 8: f(r, std::integral_constant<int, 8>()); break;
        }
    }
}

} // namespace semcache

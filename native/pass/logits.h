// logits.h - blocks of logits, which scores and fits are made from

#pragma once

#include "head.h"

#include <cmath>

namespace semcache {

constexpr float PAD_LOGIT = -1e30f;        // of the columns that only fill a panel
constexpr int32_t MAX_BLOCK_ROWS = 8 * MR; // of logits that are looked at together
// Logits that are looked at together: enough to reuse a panel of keys, few enough for the L2 cache.
constexpr int32_t BLOCK = 128 * 1024;

// Rows of logits in a block of them.
inline int32_t block_rows(int32_t n_cols) { return std::clamp(BLOCK / n_cols / MR * MR, MR, MAX_BLOCK_ROWS); }

// Logits of n_q queries q [n_q, n_embd_head_k] before the bias: x [n_q, n_cols] = q.k_i, capped. panels: packed keys.
inline void logits(
    const float * q, int32_t n_q, const float * panels, int32_t n_cols, const head_shape & shape, float * x) {
    const int32_t d = shape.n_embd_head_k;
    gemm_panels(q, d, n_q, panels, d, n_cols, x, n_cols);
    if (shape.softcap > 0.0f) {
        for (int64_t i = 0; i < (int64_t) n_q * n_cols; i += VL) {
            vstore(x + i, vsoftcap(vload(x + i), shape.softcap));
        }
    }
}

// x [n] becomes e^(x + bias - z); returns the sum. n is a multiple of VL.
inline float exp_row(float * x, const float * bias, float z, int32_t n) {
    vf sum = {};
    for (int32_t i = 0; i < n; i += VL) {
        const vf p = vexp(vload(x + i) + vload(bias + i) - z);
        vstore(x + i, p);
        sum += p;
    }
    return vsum(sum);
}

} // namespace semcache

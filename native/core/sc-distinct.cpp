#include "sc-distinct.h"

#include "sc-vec.h"

#include <algorithm>
#include <cmath>

namespace semcache {

void key_differences(const float * k, int32_t n_mean, int32_t n, int32_t n_embd_head_k, float * mean, float * score) {
    const int32_t d = n_embd_head_k;
    auto inv_norm = [&](const float * x) { return 1.0f / std::max(std::sqrt(dot(x, x, d)), 1e-12f); };
    std::fill_n(mean, d, 0.0f);
    for (int32_t i = 0; i < n_mean; ++i) {
        axpy(inv_norm(k + (int64_t) i * d), k + (int64_t) i * d, mean, d);
    }
    const float scale = inv_norm(mean);
    for (int32_t i = 0; i < n; ++i) {
        const float * ki = k + (int64_t) i * d;
        score[i] = -scale * inv_norm(ki) * dot(ki, mean, d);
    }
}

} // namespace semcache

// KeyDiff (Park et al. 2025, arXiv 2504.15364): the keys least like the mean of all unit keys stay.

#include "sc-evict.h"

#include "sc-vec.h"

#include <algorithm>
#include <cmath>

namespace semcache {

void evict_keydiff(const evict_input & x, float * anchor, float * score) {
    const int32_t d = x.n_embd_head_k;
    auto inv_norm = [&](const float * k) { return 1.0f/std::max(std::sqrt(dot(k, k, d)), 1e-12f); };
    std::fill_n(anchor, d, 0.0f);
    for (int32_t i = 0; i < x.n_cand; ++i) {
        const float * k = x.k + (int64_t) i*d;
        axpy(inv_norm(k), k, anchor, d);
    }
    const float scale = inv_norm(anchor);
    for (int32_t i = 0; i < x.n_row; ++i) {
        const float * k = x.k + (int64_t) i*d;
        score[i] = -scale*inv_norm(k)*dot(k, anchor, d);
    }
}

} // namespace semcache

// Knorm (Devoto et al. 2024, arXiv 2406.11430): the shortest keys stay.

#include "sc-evict.h"

#include "sc-vec.h"

#include <cmath>

namespace semcache {

void evict_knorm(const evict_input & x, float *, float * score) {
    for (int32_t i = 0; i < x.n_row; ++i) {
        const float * k = x.k + (int64_t) i * x.n_embd_head_k;
        score[i] = -std::sqrt(dot(k, k, x.n_embd_head_k));
    }
}

} // namespace semcache

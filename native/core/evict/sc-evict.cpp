#include "sc-evict.h"

#include "sc-vec.h"

#include <algorithm>
#include <cmath>

namespace semcache {

void evict_input::add_shares(int32_t query, float * p, float * score) const {
    const float * y    = q + (int64_t) query*n_embd_head_k;
    const int32_t last = voter_token[query/n_gqa];
    float mx = -INFINITY;
    for (int32_t i = 0; i < n_row; ++i) {
        const float x = dot(y, k + (int64_t) i*n_embd_head_k, n_embd_head_k);
        p[i] = row_token[i] > last ? -INFINITY : softcap > 0.0f ? softcap*std::tanh(x/softcap) : x;
        mx   = std::max(mx, p[i]);
    }
    float sum = 0.0f;
    for (int32_t i = 0; i < n_row; ++i) {
        p[i] = std::exp(p[i] - mx);
        sum += p[i];
    }
    for (int32_t i = 0; i < n_row; ++i) {
        score[i] += p[i]/sum;
    }
}

} // namespace semcache

#include "sc-evict.h"

#include "sc-vec.h"

#include <algorithm>
#include <cmath>

namespace semcache {

void evict_input::add_shares(int32_t query, float * p, float * score) const {
    const float * y = q + (int64_t) query * n_embd_head_k;
    const int32_t last = voter_token[query / n_gqa];
    for (int32_t i = 0; i < n_row; ++i) {
        const float x = dot(y, k + (int64_t) i * n_embd_head_k, n_embd_head_k);
        p[i] = row_token[i] > last ? -INFINITY : softcap > 0.0f ? softcap * std::tanh(x / softcap) : x;
    }
    const float sum = exp_all(p, n_row);
    for (int32_t i = 0; i < n_row; ++i) {
        score[i] += p[i] / sum;
    }
}

void evict_scores(method how, const evict_input & x, float * p, float * score) {
    switch (how) {
        case method::keydiff: return evict_keydiff(x, p, score);
        case method::knorm: return evict_knorm(x, p, score);
        case method::snapkv: return evict_snapkv(x, p, score);
        case method::tova: return evict_tova(x, p, score);
        case method::h2o: return evict_h2o(x, p, score);
        default: return; // evicts() says no
    }
}

} // namespace semcache

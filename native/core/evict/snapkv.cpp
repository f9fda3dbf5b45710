// SnapKV (Li et al. 2024, arXiv 2404.14469): the mean attention of the newest tokens' queries, smoothed along the text.

#include "sc-evict.h"

#include <algorithm>

namespace semcache {

constexpr int32_t N_OBSERVE = 64; // tokens whose queries count, as far as they vote
constexpr int32_t N_POOL = 5;     // rows of the moving average

void evict_snapkv(const evict_input & x, float * p, float * score) {
    std::fill_n(score, x.n_row, 0.0f);
    for (int32_t i = 0; i < x.n_query(); ++i) {
        if (x.voter_token[i / x.n_gqa] + N_OBSERVE > x.voter_token[x.n_voter - 1]) {
            x.add_shares(i, p, score);
        }
    }
    std::copy_n(score, x.n_cand, p);
    for (int32_t i = 0; i < x.n_cand; ++i) {
        float sum = 0.0f;
        for (int32_t j = std::max(0, i - N_POOL / 2); j < std::min(x.n_cand, i + N_POOL / 2 + 1); ++j) {
            sum += p[j];
        }
        score[i] = sum / N_POOL;
    }
}

} // namespace semcache

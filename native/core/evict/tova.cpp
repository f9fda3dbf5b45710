// TOVA (Oren et al. 2024, arXiv 2401.06104): the attention of the newest query, on the average of the group's heads.

#include "sc-evict.h"

#include <algorithm>

namespace semcache {

void evict_tova(const evict_input & x, float * p, float * score) {
    std::fill_n(score, x.n_row, 0.0f);
    for (int32_t i = std::max(0, x.n_query() - x.n_gqa); i < x.n_query(); ++i) {
        x.add_shares(i, p, score);
    }
}

} // namespace semcache

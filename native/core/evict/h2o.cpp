// H2O (Zhang et al. 2023, arXiv 2306.14048): the attention that a row has received so far, of all queries together.

#include "sc-evict.h"

#include <algorithm>

namespace semcache {

void evict_h2o(const evict_input & x, float * p, float * score) {
    std::copy_n(x.s_old, x.n_row, score);
    for (int32_t i = 0; i < x.n_query(); ++i) {
        x.add_shares(i, p, score);
    }
}

} // namespace semcache

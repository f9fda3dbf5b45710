// KeyDiff (Park et al. 2025, arXiv 2504.15364): the keys least like the mean of all unit keys stay.

#include "sc-distinct.h"
#include "sc-evict.h"

namespace semcache {

void evict_keydiff(const evict_input & x, float * mean, float * score) {
    key_differences(x.k, x.n_cand, x.n_row, x.n_embd_head_k, mean, score);
}

} // namespace semcache

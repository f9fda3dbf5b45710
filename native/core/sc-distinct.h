// sc-distinct.h - how unlike the others a key is

#pragma once

#include <cstdint>

namespace semcache {

// Minus the cosine between each key and the mean of the first n_mean, each a unit vector (KeyDiff, Park et al. 2025,
// arXiv 2504.15364): k [n, n_embd_head_k] -> score [n]. mean [n_embd_head_k] is scratch. A key of zero gives 0.
void key_differences(const float * k, int32_t n_mean, int32_t n, int32_t n_embd_head_k, float * mean, float * score);

} // namespace semcache

// sc-lookahead.h - queries turned forward, so that every key lies in their past

#pragma once

#include <cstdint>
#include <vector>

namespace semcache {

// Rotary embedding of one layer as plain angles: a position step of one turns pair i by inv_freq[i]. All scaling
// schemes of ggml_rope_ext (linear, YaRN, frequency factors) are linear in the position, so they end up in inv_freq;
// the attention factor of YaRN scales q and k once, when they are stored, and has no part in turning them further.
struct rope {
    std::vector<float> inv_freq; // [n_rot/2], radians per position; empty: no rotation
    bool neox = true;            // pairs (i, i + n_rot/2); otherwise (2i, 2i + 1)

    // Cosine and sine of every angle: cs [n_delta, n_rot/2, 2] for turns by delta [n_delta] positions.
    void table(const std::vector<int64_t> & delta, std::vector<float> & cs) const;

    // The mean of the turns to the positions [first, first + n): cs [n_rot/2, 2], shorter than 1 the faster a pair
    // turns.
    void mean_table(int64_t first, int64_t n, std::vector<float> & cs) const;
};

// Turns x [n_rot] in place by the angles cs [n_rot/2, 2]; neox as in rope.
void turn(float * x, const float * cs, int32_t n_rot, bool neox);

// splitmix64 of seed + pos, modulo n_horizon: the look-ahead of the query at `pos`, the same in every run and thread.
int32_t look_ahead(uint64_t seed, int64_t pos, int32_t n_horizon);

} // namespace semcache

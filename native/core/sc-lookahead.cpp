#include "sc-lookahead.h"

#include <cmath>

namespace semcache {

void rope::table(const std::vector<int64_t> & delta, std::vector<float> & cs) const {
    const size_t n = inv_freq.size();
    cs.resize(delta.size() * n * 2);
    for (size_t t = 0; t < delta.size(); ++t) {
        for (size_t i = 0; i < n; ++i) {
            const double angle = (double) delta[t] * inv_freq[i];
            cs[(t * n + i) * 2 + 0] = (float) std::cos(angle);
            cs[(t * n + i) * 2 + 1] = (float) std::sin(angle);
        }
    }
}

void rope::mean_table(int64_t first, int64_t n, std::vector<float> & cs) const {
    cs.resize(inv_freq.size() * 2);
    for (size_t i = 0; i < inv_freq.size(); ++i) { // a geometric series of e^(i w)
        const double w = inv_freq[i], half = std::sin(0.5 * w);
        const double length = half != 0.0 ? std::sin(0.5 * w * (double) n) / (half * (double) n) : 1.0;
        const double angle = w * ((double) first + 0.5 * (double) (n - 1));
        cs[2 * i + 0] = (float) (length * std::cos(angle));
        cs[2 * i + 1] = (float) (length * std::sin(angle));
    }
}

void turn(float * x, const float * cs, int32_t n_rot, bool neox) {
    const int32_t n = n_rot / 2;
    for (int32_t i = 0; i < n; ++i) {
        float & a = neox ? x[i] : x[2 * i];
        float & b = neox ? x[i + n] : x[2 * i + 1];
        const float a0 = a;
        a = a0 * cs[2 * i] - b * cs[2 * i + 1];
        b = a0 * cs[2 * i + 1] + b * cs[2 * i];
    }
}

int32_t look_ahead(uint64_t seed, int64_t pos, int32_t n_horizon) {
    uint64_t z = seed + (uint64_t) pos + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (int32_t) (z % (uint64_t) n_horizon);
}

} // namespace semcache

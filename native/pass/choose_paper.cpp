// The clusters of the SemantiCache paper: every chunk gets its share of an equal budget and the cosine threshold that
// meets it; whole chunks go, oldest first, when there are more chunks than rows.

#include "choose.h"

#include <cmath>

namespace semcache {

namespace {

// Greedy clusters of candidates [begin, end) in reading order: a row joins the first seed whose key is at least `tau`
// close by cosine. Returns the number of clusters.
int32_t greedy_clusters(
    int32_t begin, int32_t end, int32_t d, float tau, const float * k, const float * norm, int32_t * winner) {
    int32_t n = 0;
    std::fill(winner + begin, winner + end, DROPPED);
    for (int32_t i = begin; i < end; ++i) {
        if (winner[i] != DROPPED) {
            continue;
        }
        winner[i] = i;
        ++n;
        for (int32_t j = i + 1; j < end; ++j) {
            // not >=, so that a NaN joins: every chunk must be able to become one cluster
            if (winner[j] == DROPPED && !(dot(k + (int64_t) i * d, k + (int64_t) j * d, d) < tau * norm[i] * norm[j])) {
                winner[j] = i;
            }
        }
    }
    return n;
}

} // namespace

void choose_paper(const pass_head & h, const pass_rows & x, pass_choice & c, choose_scratch & t) {
    const int32_t d = h.a.shape.n_embd_head_k, budget = h.budget();
    int64_t n_tok = 0;
    float * norm = t.s_key;
    for_rows(h.n_cand, [&](int32_t i) {
        n_tok += c.n_tok[i];
        norm[i] = std::sqrt(dot(x.k + (int64_t) i * d, x.k + (int64_t) i * d, d));
        norm[i] = norm[i] > 0.0f ? norm[i] : 1.0f; // a key of zero has cosine 0 with every other
    });
    auto share = [&](int32_t begin, int32_t end) {
        int64_t n = 0;
        for (int32_t i = begin; i < end; ++i) {
            n += c.n_tok[i];
        }
        return (int32_t) std::max<int64_t>(1, n * budget / n_tok);
    };
    int64_t total = 0;
    for_chunks(h.n_cand, c.chunk, [&](int32_t begin, int32_t end) { total += share(begin, end); });
    for_chunks(h.n_cand, c.chunk, [&](int32_t begin, int32_t end) {
        const int32_t b = share(begin, end);
        if (total > budget) {
            total -= b;
            std::fill(c.winner + begin, c.winner + end, DROPPED);
            return;
        }
        float lo = -1.001f, hi = 1.001f;
        if (end - begin <= b) {
            lo = 2.0f;
        } else {
            for (int step = 0; step < 20; ++step) {
                const float mid = 0.5f * (lo + hi);
                (greedy_clusters(begin, end, d, mid, x.k, norm, c.winner) > b ? hi : lo) = mid;
            }
        }
        greedy_clusters(begin, end, d, lo, x.k, norm, c.winner);
    });
}

} // namespace semcache

#include "merge.h"

#include <cmath>
#include <numeric>

namespace semcache {

pass_merged::pass_merged(arena & a, const head_shape & shape, const pass_sizes & n) : n(0) {
    const int64_t n_most = pad_to(n.n_rows / 2, MAX_NR);
    count = a.take<int32_t>(n.n_rows);
    place = a.take<int32_t>(n.n_rows);
    first = a.take<int32_t>(n.n_rows);
    k = a.take<float>(n_most * shape.n_embd_head_k);
    v = a.take<float>(n_most * value_stride(shape));
    bias = a.take<float>(n_most);
}

void merge(const pass_head & h, const pass_rows & x, const pass_scores & s, pass_choice & c, pass_merged & m) {
    std::fill_n(m.count, h.n_cand, 0);
    for_rows(h.n_cand, [&](int32_t i) {
        if (c.winner[i] != DROPPED) {
            ++m.count[c.winner[i]];
        }
    });
    m.n = 0;
    for_rows(h.n_cand, [&](int32_t i) {
        if (c.winner[i] == i && m.count[i] > 1) {
            m.first[m.n] = i;
            m.place[i] = m.n++;
        }
    });
    const int32_t d_k = h.a.shape.n_embd_head_k, d_v = h.a.shape.n_embd_head_v;
    const int64_t ld = value_stride(h.a.shape);
    float * weight = m.bias; // sums, until the biases are known
    std::fill_n(m.k, pad_to(m.n, NR) * d_k, 0.0f);
    std::fill_n(m.v, m.n * ld, 0.0f);
    std::fill_n(weight, m.n, 0.0f);
    for_rows(h.n_cand, [&](int32_t i) {
        const int32_t j = c.winner[i];
        if (j == DROPPED || m.count[j] < 2) {
            return;
        }
        const int32_t t = m.place[j];
        axpy(s.w[i], x.k + (int64_t) i * d_k, m.k + (int64_t) t * d_k, d_k);
        axpy(s.w[i], x.v + i * ld, m.v + t * ld, d_v);
        weight[t] += s.w[i];
        if (i != j) {
            c.n_tok[j] += c.n_tok[i];
        }
    });
    for_rows(m.n, [&](int32_t t) {
        const float inv = 1.0f / weight[t];
        for_rows(d_k, [&](int32_t e) { m.k[(int64_t) t * d_k + e] *= inv; });
        for_rows(d_v, [&](int32_t e) { m.v[t * ld + e] *= inv; });
        m.bias[t] = std::log((float) c.n_tok[m.first[t]]);
    });
}

void keep_all(const pass_head & h, pass_choice & c, pass_merged & m) {
    std::iota(c.winner, c.winner + h.n_cand, 0);
    std::fill_n(m.count, h.n_cand, 1);
    m.n = 0;
}

} // namespace semcache

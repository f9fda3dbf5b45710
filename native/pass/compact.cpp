#include "compact.h"

namespace semcache {

pass_result compact(const pass_head & h, pass_rows & x, const pass_choice & c, pass_merged & m) {
    pass_result res;
    const int64_t d_k = h.a.shape.n_embd_head_k, d_v = h.a.shape.n_embd_head_v, ld = value_stride(h.a.shape);
    const int32_t n_row_sink = h.plan.n_row_sink;
    for_rows(h.plan.n_sink, [&](int32_t i) {
        const int32_t row = h.n_cand + n_row_sink + i;
        h.store_sink(i, x.k + row * d_k, x.v + row * ld);
    });
    int32_t dst = n_row_sink + h.plan.n_sink;
    for_rows(h.n_cand, [&](int32_t i) {
        if (c.winner[i] != i) {
            ++(c.winner[i] == DROPPED ? res.n_dropped : res.n_merged);
            return;
        }
        float bias = 0.0f;
        if (m.count[i] > 1) {
            const int32_t t = m.place[i];
            h.store_core(dst, m.k + t * d_k, m.v + t * ld);
            bias = m.bias[t];
        } else if (i >= h.n_core) {
            h.store_core(dst, x.k + i * d_k, x.v + i * ld);
        } else {
            const int32_t src = n_row_sink + i;
            bias = h.bias(src);
            if (src != dst) {
                std::copy_n(h.k(src), row_size(h.a.k_type, d_k), h.k(dst));
                std::copy_n(h.v(src), row_size(h.a.v_type, d_v), h.v(dst));
            }
        }
        h.remember(dst++, bias, c.s_use[i], c.chunk[i], c.n_tok[i]);
    });
    h.a.row_count[h.ih] = dst;
    return res;
}

} // namespace semcache

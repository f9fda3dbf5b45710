#include "load.h"

#include "sc-lookahead.h"

namespace semcache {

pass_rows::pass_rows(arena & a, const head_shape & shape, const pass_sizes & n) {
    const int64_t n_cols = pad_to(n.n_rows, MAX_NR);
    k = a.take<float>(n_cols * shape.n_embd_head_k);
    v = a.take<float>(n_cols * value_stride(shape));
    // a tile may end behind the last row
    q = a.take<float>((int64_t) n.n_voter * shape.n_gqa * shape.n_embd_head_k + MAX_NR);
}

int32_t n_fit_query(const pass_head & h) {
    const int32_t stride = fit_stride(h.plan.n_voter, h.a.shape.n_gqa);
    return (h.plan.n_voter + stride - 1) / stride * h.a.shape.n_gqa;
}

void load_rows(const pass_head & h, pass_rows & x) {
    const int32_t d_k = h.a.shape.n_embd_head_k, d_v = h.a.shape.n_embd_head_v;
    const int64_t ld = value_stride(h.a.shape);
    float * k = x.k;
    float * v = x.v;
    auto end_row = [&] {
        std::fill(v + d_v, v + ld, 0.0f);
        k += d_k;
        v += ld;
    };
    h.for_all_rows(
        [&](int32_t i) {
            h.load_core_key(i, k);
            h.load_core_value(i, v);
            end_row();
        },
        [&](int32_t t) {
            h.load_token_key(t, k);
            h.load_token_value(t, v);
            end_row();
        });
}

void load_queries(const pass_head & h, int32_t stride, pass_rows & x) {
    const head_shape & shape = h.a.shape;
    const int32_t d = shape.n_embd_head_k;
    float * q = x.q;
    auto load = [&](int32_t t) {
        h.load_query(t, q);
        for (int32_t g = 0; g < shape.n_gqa; ++g, q += d) {
            const float * weight = h.query_weight(g);
            if (weight) { // a channel of weight 0 has lost what would turn into its pair: nothing of it comes back
                for_rows(d, [&](int32_t i) { q[i] = weight[i] != 0.0f ? q[i] / weight[i] : 0.0f; });
            }
            turn(q, h.a.turn + (int64_t) t * h.a.n_rot, h.a.n_rot, h.a.neox);
            for_rows(d, [&](int32_t i) { q[i] *= weight ? weight[i] * shape.scale : shape.scale; });
        }
    };
    for (int32_t t = 0; t < h.plan.n_voter; t += stride) {
        load(t);
    }
    for_rows(h.plan.n_voter, [&](int32_t t) {
        if (t % stride != 0) {
            load(t);
        }
    });
}

} // namespace semcache

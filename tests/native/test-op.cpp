// GGML_OP_PROP_ATTN in a graph on the CPU backend, against the same attention spelled out in ggml's own operations.

#include "sc-quant.h"
#include "sc-test.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-prop-attn.h"

#include <algorithm>
#include <functional>

using namespace semcache;
using sc_test::rng;

namespace {

struct spec {
    int64_t d_k = 64, d_v = 64, n_gqa = 3, n_tokens = 1, n_kv = 256;
    std::vector<int32_t> cores = { 90, 0, 33 }; // rows in use of every kv head
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16;
    float softcap = 0.0f;
    bool sinks = false, v_trans = false, mask_f32 = false, outliers = false;
    uint64_t seed = 1;
};

row_type row_type_of(ggml_type t) {
    return t == GGML_TYPE_F16 ? row_type::f16 : t == GGML_TYPE_Q8_0 ? row_type::q8_0 : row_type::q4_0;
}

// A graph that computes one tensor of host memory.
struct graph {
    ggml_context_ptr ctx{ ggml_init({ 256u << 20, nullptr, false }) };

    ggml_tensor * tensor(ggml_type type, std::vector<int64_t> ne) {
        return ggml_new_tensor(ctx.get(), type, (int) ne.size(), ne.data());
    }

    ggml_tensor * of(const std::vector<float> & x, std::vector<int64_t> ne, ggml_type type = GGML_TYPE_F32) {
        ggml_tensor * t = tensor(type, ne);
        if (type == GGML_TYPE_F32) {
            std::copy(x.begin(), x.end(), (float *) t->data);
        } else {
            f32_to_f16_row(x.data(), (f16 *) t->data, (int) x.size());
        }
        return t;
    }

    std::vector<float> compute(ggml_tensor * t, int n_threads) {
        ggml_cgraph * gf = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(gf, t);
        ggml_graph_compute_with_ctx(ctx.get(), gf, n_threads);
        return std::vector<float>((const float *) t->data, (const float *) t->data + ggml_nelements(t));
    }
};

struct inputs {
    spec s;
    int64_t n_head_kv, n_head, n_row;
    std::vector<float> q, k, v, mask, bias, sinks, core_k, core_v; // k, v: [n_kv, n_head_kv, d]; values that f16 holds
    std::vector<int32_t> rows;

    explicit inputs(const spec & spec) : s(spec), n_head_kv((int64_t) s.cores.size()), n_head(n_head_kv * s.n_gqa) {
        rng r(s.seed);
        auto fill = [&](int64_t n, double scale) {
            std::vector<float> x(n);
            for (float & y : x) {
                y = f16_to_f32(f32_to_f16((float) (scale * r.normal())));
            }
            return x;
        };
        int32_t n = 0;
        rows.resize(2 * n_head_kv);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            rows[h] = n;
            rows[n_head_kv + h] = s.cores[h];
            n += s.cores[h] + 3; // free rows behind
        }
        n_row = n;
        q = fill(s.d_k * n_head * s.n_tokens, 1.2);
        k = fill(s.d_k * n_head_kv * s.n_kv, 1.0);
        v = fill(s.d_v * n_head_kv * s.n_kv, 1.0);
        core_k = fill(s.d_k * n_row, 1.0);
        core_v = fill(s.d_v * n_row, 1.0);
        bias = fill(n_row, 1.0);
        sinks = fill(n_head, 2.0);
        for (int64_t i = 0; s.outliers && i < n_row; ++i) {
            core_k[i * s.d_k + 5] = 20.0f;
            core_v[i * s.d_v + 3] *= 50.0f;
        }
        for (int64_t t = 0; t < s.n_tokens; ++t) { // the tokens are in the last cells
            for (int64_t i = 0; i < s.n_kv; ++i) {
                mask.push_back(i > s.n_kv - s.n_tokens + t || r.below(9) == 0 ? -INFINITY : 0.0f);
            }
        }
    }
};

std::vector<float> run_op(const inputs & x, int n_threads) {
    const spec & s = x.s;
    graph g;
    ggml_tensor * q = g.of(x.q, { s.d_k, x.n_head, s.n_tokens });
    ggml_tensor * k = g.of(x.k, { s.d_k, x.n_head_kv, s.n_kv }, GGML_TYPE_F16);
    ggml_tensor * v = g.of(x.v, { s.d_v, x.n_head_kv, s.n_kv }, GGML_TYPE_F16);
    if (s.v_trans) { // memory [n_kv, d_v, n_head_kv], seen as the cache's get_v() shows it
        ggml_tensor * t = g.tensor(GGML_TYPE_F16, { s.n_kv, s.d_v, x.n_head_kv });
        for (int64_t h = 0; h < x.n_head_kv; ++h) {
            for (int64_t e = 0; e < s.d_v; ++e) {
                for (int64_t i = 0; i < s.n_kv; ++i) {
                    ((f16 *) t->data)[(h * s.d_v + e) * s.n_kv + i] =
                        f32_to_f16(x.v[(i * x.n_head_kv + h) * s.d_v + e]);
                }
            }
        }
        v = ggml_permute(g.ctx.get(), t, 0, 2, 1, 3);
    }
    auto cores = [&](const std::vector<float> & from, int64_t d, ggml_type type) {
        ggml_tensor * t = g.tensor(type, { d, x.n_row });
        for (int64_t i = 0; i < x.n_row; ++i) {
            std::vector<float> row(from.begin() + i * d, from.begin() + (i + 1) * d);
            store_row(row_type_of(type), row.data(), (char *) t->data + i * t->nb[1], (int32_t) d);
        }
        return t;
    };
    ggml_tensor * rows = g.tensor(GGML_TYPE_I32, { x.n_head_kv, 2 });
    std::copy(x.rows.begin(), x.rows.end(), (int32_t *) rows->data);
    ggml_tensor * out = ggml_prop_attn(g.ctx.get(), q, k, v,
        g.of(x.mask, { s.n_kv, s.n_tokens }, s.mask_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16),
        cores(x.core_k, s.d_k, s.k_type), cores(x.core_v, s.d_v, s.v_type), g.of(x.bias, { x.n_row }), rows,
        s.sinks ? g.of(x.sinks, { x.n_head }) : nullptr, 1.0f / std::sqrt((float) s.d_k), s.softcap);
    CHECK_EQ(std::string(ggml_op_name(out->op)), "PROP_ATTN");
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    CHECK(ggml_backend_supports_op(cpu.get(), out));
    return g.compute(out, n_threads);
}

// Per kv head mul_mat, soft_max and mul_mat over its cores and all cells; rows of cores as they are after being stored.
std::vector<float> run_composed(const inputs & x) {
    const spec & s = x.s;
    std::vector<float> res(s.d_v * x.n_head * s.n_tokens);
    auto stored = [&](const std::vector<float> & from, int64_t i, int64_t d, ggml_type type) {
        std::vector<float> row(from.begin() + i * d, from.begin() + (i + 1) * d);
        std::vector<uint8_t> bytes(row_size(row_type_of(type), d));
        store_row(row_type_of(type), row.data(), bytes.data(), (int32_t) d);
        load_row(row_type_of(type), bytes.data(), row.data(), (int32_t) d);
        return row;
    };
    for (int64_t h = 0; h < x.n_head_kv; ++h) {
        const int64_t n_core = x.rows[x.n_head_kv + h], n = n_core + s.n_kv;
        std::vector<float> k, v(n * s.d_v), q, mask;
        auto put_v = [&](int64_t i, const float * row) {
            for (int64_t e = 0; e < s.d_v; ++e) {
                v[e * n + i] = row[e];
            }
        };
        for (int64_t i = 0; i < n_core; ++i) {
            const auto row = stored(x.core_k, x.rows[h] + i, s.d_k, s.k_type);
            k.insert(k.end(), row.begin(), row.end());
            put_v(i, stored(x.core_v, x.rows[h] + i, s.d_v, s.v_type).data());
        }
        for (int64_t i = 0; i < s.n_kv; ++i) {
            const float * row = x.k.data() + (i * x.n_head_kv + h) * s.d_k;
            k.insert(k.end(), row, row + s.d_k);
            put_v(n_core + i, x.v.data() + (i * x.n_head_kv + h) * s.d_v);
        }
        for (int64_t g = 0; g < s.n_gqa; ++g) {
            for (int64_t t = 0; t < s.n_tokens; ++t) {
                const float * row = x.q.data() + (t * x.n_head + h * s.n_gqa + g) * s.d_k;
                q.insert(q.end(), row, row + s.d_k);
            }
        }
        for (int64_t t = 0; t < s.n_tokens; ++t) {
            mask.insert(mask.end(), x.bias.begin() + x.rows[h], x.bias.begin() + x.rows[h] + n_core);
            mask.insert(mask.end(), x.mask.begin() + t * s.n_kv, x.mask.begin() + (t + 1) * s.n_kv);
        }
        graph g;
        ggml_context * ctx = g.ctx.get();
        ggml_tensor * kq = ggml_mul_mat(ctx, g.of(k, { s.d_k, n }), g.of(q, { s.d_k, s.n_tokens, s.n_gqa }));
        float scale = 1.0f / std::sqrt((float) s.d_k);
        if (s.softcap > 0.0f) {
            kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, scale / s.softcap)), s.softcap);
            scale = 1.0f;
        }
        kq = ggml_soft_max_ext(ctx, kq, g.of(mask, { n, s.n_tokens }), scale, 0.0f);
        if (s.sinks) {
            ggml_soft_max_add_sinks(
                kq, g.of({ x.sinks.begin() + h * s.n_gqa, x.sinks.begin() + (h + 1) * s.n_gqa }, { s.n_gqa }));
        }
        const std::vector<float> out = g.compute(ggml_mul_mat(ctx, g.of(v, { n, s.d_v }), kq), 1);
        for (int64_t i = 0; i < s.n_gqa * s.n_tokens; ++i) { // [d_v, n_tokens, n_gqa]
            std::copy_n(out.begin() + i * s.d_v, s.d_v,
                res.begin() + ((i % s.n_tokens) * x.n_head + h * s.n_gqa + i / s.n_tokens) * s.d_v);
        }
    }
    return res;
}

void check(const spec & s) {
    CASE("d " + std::to_string(s.d_k) + "/" + std::to_string(s.d_v) + ", gqa " + std::to_string(s.n_gqa) + ", tokens " +
         std::to_string(s.n_tokens) + ", " + ggml_type_name(s.k_type) + "/" + ggml_type_name(s.v_type) + ", seed " +
         std::to_string(s.seed));
    const inputs x(s);
    const std::vector<float> want = run_composed(x), got = run_op(x, 1), other = run_op(x, 3);
    CHECK_EQ(got.size(), want.size());
    CHECK_BITS(other.data(), got.data(), (int64_t) got.size()); // whatever the number of threads
    double err = 0.0, size = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        err += ((double) got[i] - want[i]) * ((double) got[i] - want[i]);
        size += (double) want[i] * want[i];
    }
    // both are float32, and exp in ggml errs by 1e-6
    CHECK(err < 1e-10 * size);
}

void test_shapes() {
    const int64_t sizes[][2] = { { 64, 64 }, { 80, 80 }, { 96, 96 }, { 128, 128 }, { 256, 256 }, { 96, 64 } };
    const int64_t all_gqa[] = { 1, 2, 3, 7, 8, 16 };
    const ggml_type types[] = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    const std::vector<int32_t> ragged[] = { { 130, 0, 37 }, { 64 }, { 1, 200 }, { 0 }, { 300, 3 } };
    rng r(9);
    uint64_t n = 0;
    for (const auto & d : sizes) {
        for (int64_t n_tokens : { 1, 2, 8, 9, 64, 512 }) {
            spec s;
            s.d_k = d[0];
            s.d_v = d[1];
            s.n_gqa = all_gqa[r.below(6)];
            s.n_tokens = n_tokens;
            s.n_kv = n_tokens + 1 + r.below(300);
            s.cores = ragged[n % 5];
            s.softcap = r.below(3) ? 0.0f : 20.0f;
            s.sinks = r.below(2);
            s.v_trans = r.below(2);
            s.mask_f32 = r.below(2);
            s.outliers = r.below(2);
            if (s.d_k % 32 == 0 && s.d_v % 32 == 0) {
                s.k_type = types[r.below(3)];
                s.v_type = types[r.below(3)];
            }
            s.seed = ++n;
            check(s);
        }
    }
    for (ggml_type k_type : types) {
        for (ggml_type v_type : types) {
            for (int64_t n_tokens : { 1, 20 }) {
                spec s;
                s.k_type = k_type;
                s.v_type = v_type;
                s.n_tokens = n_tokens;
                s.outliers = true;
                check(s);
            }
        }
    }
}

// The blocks are ggml's, to the bit.
void test_quantization() {
    rng r(3);
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        CASE(ggml_type_name(type));
        for (int n = 0; n < 200; ++n) {
            std::vector<float> x(64), y(64), z(64);
            for (float & e : x) {
                e = (float) (r.below(40) ? r.normal() : 30.0 * r.normal()) * (n == 0 ? 0.0f : 1.0f);
            }
            std::vector<uint8_t> want(ggml_row_size(type, 64)), got(row_size(row_type_of(type), 64));
            CHECK_EQ(want.size(), got.size());
            ggml_get_type_traits(type)->from_float_ref(x.data(), want.data(), 64);
            if (type == GGML_TYPE_Q8_0) {
                f32_to_q8_0_row(x.data(), (q8_block *) got.data(), 64);
            } else {
                f32_to_q4_0_row(x.data(), (q4_block *) got.data(), 64);
            }
            CHECK_BITS(got.data(), want.data(), (int64_t) got.size());
            ggml_get_type_traits(type)->to_float(want.data(), y.data(), 64);
            decode_row(row_type_of(type), got.data(), z.data(), 64);
            CHECK_BITS(z.data(), y.data(), 64);
        }
    }
}

} // namespace

int main() {
    test_quantization();
    test_shapes();
    return sc_test::finish();
}

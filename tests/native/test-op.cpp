// GGML_OP_PROP_ATTN in a graph on the CPU backend, against the same attention spelled out in ggml's own operations.

#include "sc-quant.h"
#include "sc-test.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-prop-attn.h"
#include "ggml-row-type.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

using namespace semcache;
using sc_test::rng;

namespace {

struct spec {
    int64_t d_k = 64, d_v = 64, n_gqa = 3, n_tokens = 1, n_kv = 256;
    std::vector<int32_t> cores = { 90, 0, 33 }; // rows in use of every kv head
    ggml_type k_type = GGML_TYPE_F16, v_type = GGML_TYPE_F16, cell_type = GGML_TYPE_F16;
    float softcap = 0.0f;
    bool sinks = false, v_trans = false, mask_f32 = false, outliers = false;
    uint64_t seed = 1;
};

constexpr ggml_type ALL_TYPES[] = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL };
constexpr int64_t N_SINK = 2;

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
            encode_row(row_type_of(type), x.data(), t->data, (int32_t) x.size());
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
    std::vector<float> q, k, v, mask, bias, sinks, core_k, core_v,
        heads; // k, v: [n_kv, n_head_kv, d]; values that f16 holds
    std::vector<int32_t> rows;

    int64_t head_of(int64_t row) const {
        return std::upper_bound(rows.begin(), rows.begin() + n_head_kv, (int32_t) row) - rows.begin() - 1;
    }

    head_parts<const f16> parts(const std::vector<f16> & all, int64_t h) const {
        return { all.data(), (int32_t) h, s.d_k, s.d_v, N_SINK };
    }

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
        heads = fill(n_head_kv * head_size(s.d_k, s.d_v, N_SINK), 1.0);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            for (int64_t e = 0; e < s.d_k; ++e) { // scales
                float & x = heads[h * head_size(s.d_k, s.d_v, N_SINK) + s.d_k + e];
                x = 0.5f + std::fabs(x);
                x = f16_to_f32(f32_to_f16(x));
            }
        }
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

double distance(const std::vector<float> & x, const std::vector<float> & y) {
    double err = 0.0, size = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
        err += ((double) x[i] - y[i]) * ((double) x[i] - y[i]);
        size += (double) y[i] * y[i];
    }
    return std::isfinite(err) ? err / size : INFINITY;
}

int64_t n_on_devices = 0; // results of devices that were compared

// The node on every other device that computes it, all tensors in its memory. Devices take rows as f16.
void check_devices(const ggml_tensor * out, const std::vector<float> & want) {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || !ggml_backend_dev_supports_op(dev, out)) {
            continue;
        }
        const std::string where = sc_test::state().where;
        CASE(where + ", " + ggml_backend_dev_description(dev));
        ggml_context_ptr ctx{ ggml_init({ 32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
        ggml_backend_ptr backend{ ggml_backend_dev_init(dev, nullptr) };
        ggml_tensor * node = ggml_dup_tensor(ctx.get(), out);
        node->op = out->op;
        memcpy(node->op_params, out->op_params, sizeof(out->op_params));
        for (int j = 0; j < GGML_MAX_SRC; ++j) {
            node->src[j] = out->src[j] ? ggml_dup_tensor(ctx.get(), out->src[j]) : nullptr;
        }
        ggml_backend_buffer_ptr buffer{ ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
        for (int j = 0; j < GGML_MAX_SRC; ++j) {
            if (out->src[j]) {
                ggml_backend_tensor_set(node->src[j], out->src[j]->data, 0, ggml_nbytes(out->src[j]));
            }
        }
        ggml_cgraph * gf = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(gf, node);
        CHECK_EQ((int) ggml_backend_graph_compute(backend.get(), gf), (int) GGML_STATUS_SUCCESS);
        std::vector<float> got(want.size());
        ggml_backend_tensor_get(node, got.data(), 0, ggml_nbytes(node));
        const double err = distance(got, want);
        if (err > 1e-6) {
            sc_test::report(false, __FILE__, __LINE__, "squared error " + sc_test::text(err));
        }
        ++n_on_devices;
        CASE(where);
    }
}

std::vector<float> run_op(const inputs & x, int n_threads) {
    const spec & s = x.s;
    graph g;
    ggml_tensor * q = g.of(x.q, { s.d_k, x.n_head, s.n_tokens });
    ggml_tensor * k = g.of(x.k, { s.d_k, x.n_head_kv, s.n_kv }, s.cell_type);
    ggml_tensor * v = g.of(x.v, { s.d_v, x.n_head_kv, s.n_kv }, s.cell_type);
    std::vector<f16> all(x.heads.size());
    f32_to_f16_row(x.heads.data(), all.data(), (int) all.size());
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
    auto cores = [&](const std::vector<float> & from, int64_t d, ggml_type type, bool is_k) {
        ggml_tensor * t = g.tensor(type, { d, x.n_row });
        for (int64_t i = 0; i < x.n_row; ++i) {
            std::vector<float> row(from.begin() + i * d, from.begin() + (i + 1) * d);
            char * p = (char *) t->data + i * t->nb[1];
            if (is_k) {
                store_key(row_type_of(type), row.data(), x.parts(all, x.head_of(i)).frame(), p, (int32_t) d);
            } else {
                store_value(row_type_of(type), row.data(), p, (int32_t) d);
            }
        }
        return t;
    };
    ggml_tensor * rows = g.tensor(GGML_TYPE_I32, { x.n_head_kv, 2 });
    std::copy(x.rows.begin(), x.rows.end(), (int32_t *) rows->data);
    ggml_tensor * out = ggml_prop_attn(g.ctx.get(), q, k, v,
        g.of(x.mask, { s.n_kv, s.n_tokens }, s.mask_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16),
        cores(x.core_k, s.d_k, s.k_type, true), cores(x.core_v, s.d_v, s.v_type, false),
        g.of(x.bias, { x.n_row }, GGML_TYPE_F16), rows,
        g.of(x.heads, { head_size(s.d_k, s.d_v, N_SINK), x.n_head_kv }, GGML_TYPE_F16),
        s.sinks ? g.of(x.sinks, { x.n_head }) : nullptr, 1.0f / std::sqrt((float) s.d_k), s.softcap, false);
    CHECK_EQ(std::string(ggml_op_name(out->op)), "PROP_ATTN");
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    CHECK(ggml_backend_supports_op(cpu.get(), out));
    const std::vector<float> res = g.compute(out, n_threads);
    check_devices(out, res);
    return res;
}

// Per kv head mul_mat, soft_max and mul_mat over its cores and all cells; rows of cores as they are after being stored.
std::vector<float> run_composed(const inputs & x) {
    const spec & s = x.s;
    std::vector<float> res(s.d_v * x.n_head * s.n_tokens);
    std::vector<f16> all(x.heads.size());
    f32_to_f16_row(x.heads.data(), all.data(), (int) all.size());
    // a row as it is after being stored: a sink's are in `heads`
    auto key_of = [&](int64_t h, int64_t i) {
        const auto parts = x.parts(all, h);
        const int32_t d = (int32_t) s.d_k;
        const row_type type = row_type_of(s.k_type);
        std::vector<float> row(x.core_k.begin() + (x.rows[h] + i) * d, x.core_k.begin() + (x.rows[h] + i + 1) * d);
        std::vector<uint8_t> bytes(row_size(type, d));
        store_key(type, row.data(), parts.frame(), bytes.data(), d);
        load_key(type, bytes.data(), parts.frame(), row.data(), d);
        if (i < N_SINK) {
            f16_to_f32_row(parts.k_sink + i * d, row.data(), d);
        }
        return row;
    };
    auto value_of = [&](int64_t h, int64_t i) {
        const int32_t d = (int32_t) s.d_v;
        const row_type type = row_type_of(s.v_type);
        std::vector<float> row(x.core_v.begin() + (x.rows[h] + i) * d, x.core_v.begin() + (x.rows[h] + i + 1) * d);
        std::vector<uint8_t> bytes(row_size(type, d));
        store_value(type, row.data(), bytes.data(), d);
        load_value(type, bytes.data(), row.data(), d);
        if (i < N_SINK) {
            f16_to_f32_row(x.parts(all, h).v_sink + i * d, row.data(), d);
        }
        return row;
    };
    auto cell = [&](const float * from, int64_t d) {
        std::vector<uint8_t> bytes(row_size(row_type_of(s.cell_type), d));
        std::vector<float> row(d);
        encode_row(row_type_of(s.cell_type), from, bytes.data(), (int32_t) d);
        decode_row(row_type_of(s.cell_type), bytes.data(), row.data(), (int32_t) d);
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
            const auto row = key_of(h, i);
            k.insert(k.end(), row.begin(), row.end());
            put_v(i, value_of(h, i).data());
        }
        for (int64_t i = 0; i < s.n_kv; ++i) {
            const auto row = cell(x.k.data() + (i * x.n_head_kv + h) * s.d_k, s.d_k);
            k.insert(k.end(), row.begin(), row.end());
            put_v(n_core + i, cell(x.v.data() + (i * x.n_head_kv + h) * s.d_v, s.d_v).data());
        }
        for (int64_t g = 0; g < s.n_gqa; ++g) {
            for (int64_t t = 0; t < s.n_tokens; ++t) {
                const float * row = x.q.data() + (t * x.n_head + h * s.n_gqa + g) * s.d_k;
                q.insert(q.end(), row, row + s.d_k);
            }
        }
        for (int64_t t = 0; t < s.n_tokens; ++t) {
            for (int64_t i = 0; i < n_core; ++i) {
                mask.push_back(i < N_SINK ? 0.0f : x.bias[x.rows[h] + i]);
            }
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
    // both are float32, and exp in ggml errs by 1e-6
    CHECK(distance(got, want) < 1e-10);
}

void test_shapes() {
    const int64_t sizes[][2] = { { 64, 64 }, { 80, 80 }, { 96, 96 }, { 128, 128 }, { 256, 256 }, { 96, 64 } };
    const int64_t all_gqa[] = { 1, 2, 3, 7, 8, 16 };
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
                s.k_type = ALL_TYPES[r.below(5)];
                s.v_type = ALL_TYPES[r.below(5)];
                s.cell_type = s.v_trans || r.below(2) ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
            }
            s.seed = ++n;
            check(s);
        }
    }
    for (ggml_type k_type : ALL_TYPES) {
        for (ggml_type v_type : ALL_TYPES) {
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

// The blocks are ggml's, to the bit; codes of IQ4_NL are chosen otherwise, and no worse.
void test_quantization() {
    rng r(3);
    for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL }) {
        double err = 0.0, err_ggml = 0.0;
        CASE(ggml_type_name(type));
        for (int n = 0; n < 200; ++n) {
            std::vector<float> x(64), y(64), z(64);
            for (float & e : x) {
                e = (float) (r.below(40) ? r.normal() : 30.0 * r.normal()) * (n == 0 ? 0.0f : 1.0f);
            }
            std::vector<uint8_t> want(ggml_row_size(type, 64)), got(row_size(row_type_of(type), 64));
            CHECK_EQ(want.size(), got.size());
            ggml_get_type_traits(type)->from_float_ref(x.data(), want.data(), 64);
            encode_row(row_type_of(type), x.data(), got.data(), 64);
            if (type == GGML_TYPE_IQ4_NL) {
                decode_row(row_type_of(type), got.data(), z.data(), 64);
                err += distance2(z.data(), x.data(), 64);
                ggml_get_type_traits(type)->to_float(want.data(), y.data(), 64);
                err_ggml += distance2(y.data(), x.data(), 64);
                want = got;
            }
            CHECK_BITS(got.data(), want.data(), (int64_t) got.size());
            ggml_get_type_traits(type)->to_float(want.data(), y.data(), 64);
            decode_row(row_type_of(type), got.data(), z.data(), 64);
            CHECK_BITS(z.data(), y.data(), 64);
        }
        CHECK(err <= 1.02 * err_ggml);
    }
}

} // namespace

// --devices [LIBRARY FUNCTION]: there has to be one besides the CPU; a backend's library and the function that names it
int main(int argc, char ** argv) {
    if (argc > 3) {
        void * library = dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL);
        void * function = library ? dlsym(library, argv[3]) : nullptr;
        if (!function) {
            printf("expected %s in %s, got %s\n", argv[3], argv[2], dlerror());
            return 1;
        }
        ggml_backend_register(((ggml_backend_reg_t (*)()) function)());
    }
    test_quantization();
    test_shapes();
    printf("%lld results of devices\n", (long long) n_on_devices);
    CHECK(n_on_devices > 0 || argc < 2 || strcmp(argv[1], "--devices") != 0);
    return sc_test::finish();
}

// Proportional attention against a slow one in float64.

#include "sc-attn.h"
#include "sc-quant.h"
#include "sc-test.h"

#include <algorithm>
#include <thread>

using namespace semcache;
using sc_test::rng;

namespace {

constexpr f16 F16_NAN = 0x7e00, F16_NEG_INF = 0xfc00;
constexpr double U = 0x1p-24; // rounding of a float32
constexpr row_type ALL_TYPES[] = { row_type::f16, row_type::q8_0, row_type::q5_0, row_type::q4_0, row_type::iq4_nl };

enum mask_type { MASK_F32, MASK_F16 };

struct spec {
    int32_t d_k = 64, d_v = 64, n_gqa = 2, n_tokens = 1, n_kv = 100;
    std::vector<int32_t> cores = { 90, 0 }; // rows in use of every kv head
    float softcap = 0.0f;
    bool sinks = false;
    mask_type mask = MASK_F16;
    row_type k_type = row_type::f16, v_type = row_type::f16; // of the cores
    row_type cell_type = row_type::f16;                      // of the stage
    int32_t n_sink = 4;                                      // of a head's rows, the first
    bool rotated = false;                                    // queries, cells' keys and those of the sinks
    bool v_trans = false;                                    // values lie along the cells
    bool q_heads = false;                                    // a head's queries lie together, not a token's
    bool outliers = false;                                   // large channels and single rows of q, k, v and bias
    bool biased = false;                                     // the mask holds other values than 0 and -inf
    int32_t blind = -1;                                      // a token that sees no cell
    uint64_t seed = 1;
};

// Tensors of a call. What may not be read is NaN, what may be read but must not count is large.
struct tensors {
    spec s;
    int32_t n_head_kv, n_head, mask_ld;
    int64_t k_head, k_cell, v_head, v_cell, v_elem; // of k and v, in values
    std::vector<float> q, mask_f32, sinks;
    std::vector<f16> k, v, mask_f16, bias, heads;
    std::vector<uint8_t> k_core, v_core, k_cells, v_cells; // the last of another type than f16
    std::vector<int32_t> row_first, row_count;
    attn_args a;

    explicit tensors(const spec & spec) :
        s(spec), n_head_kv((int32_t) spec.cores.size()), n_head(n_head_kv * spec.n_gqa) {
        rng r(s.seed);
        auto normal = [&](double scale) { return (float) (scale * r.normal()); };
        const int32_t n_cell = s.n_kv + 5; // the cache is larger than the part of it that the mask covers
        k_head = s.d_k;
        k_cell = (int64_t) s.d_k * n_head_kv;
        v_head = s.v_trans ? (int64_t) s.d_v * n_cell : s.d_v;
        v_cell = s.v_trans ? 1 : (int64_t) s.d_v * n_head_kv;
        v_elem = s.v_trans ? n_cell : 1;

        q.resize((size_t) s.n_tokens * n_head * s.d_k);
        for (float & x : q) {
            x = normal(1.2);
        }
        k.resize((size_t) n_cell * n_head_kv * s.d_k);
        v.resize((size_t) n_cell * n_head_kv * s.d_v);
        for (f16 & x : k) {
            x = f32_to_f16(normal(1.0));
        }
        for (f16 & x : v) {
            x = f32_to_f16(normal(1.0));
        }
        int32_t n_row = 1; // a free row before, between and after the heads
        for (int32_t n : s.cores) {
            row_first.push_back(n_row);
            row_count.push_back(n);
            n_row += n + 2;
        }
        k_core.assign(n_row * row_size(s.k_type, s.d_k), 0xff); // a NaN in every type
        v_core.assign(n_row * row_size(s.v_type, s.d_v), 0xff);
        bias.assign(n_row, F16_NAN);
        heads.assign(n_head_kv * head_size(s.d_k, s.d_v, s.n_sink), F16_NAN);
        for (int32_t h = 0; h < n_head_kv; ++h) {
            for (int32_t e = 0; e < s.d_k; ++e) {
                parts(h).mean[e] = f32_to_f16(s.outliers && e == 5 ? 20.0f : normal(1.0));
                parts(h).scale[e] = f32_to_f16((float) std::exp(r.normal()));
            }
            for (int32_t i = 0; i < row_count[h]; ++i) {
                std::vector<float> key(s.d_k), val(s.d_v);
                std::generate(key.begin(), key.end(), [&]() { return normal(1.0); });
                std::generate(val.begin(), val.end(), [&]() { return normal(1.0); });
                set_key(h, i, key);
                set_val(h, i, val);
                if (i >= s.n_sink) {
                    bias[row_first[h] + i] = f32_to_f16(r.below(3) ? (float) std::log(1 + r.below(32)) : normal(1.0));
                }
            }
        }
        if (s.sinks) {
            for (int32_t h = 0; h < n_head; ++h) {
                sinks.push_back(h == 1 ? 30.0f : h == 2 ? -1000.0f : normal(2.0));
            }
        }
        const float scale = 1.0f / std::sqrt((float) s.d_k);
        const int64_t size = s.cell_type == row_type::f16 ? sizeof(f16) : 0;
        a = { s.d_k, s.d_v, n_head, n_head_kv, s.n_tokens, s.n_kv, scale, s.softcap, s.rotated, q.data(),
            s.q_heads ? (int64_t) s.d_k * s.n_tokens : s.d_k, s.q_heads ? s.d_k : (int64_t) s.d_k * n_head,
            (const uint8_t *) k.data(), s.cell_type, k_head * size, k_cell * size, (const uint8_t *) v.data(),
            s.cell_type, v_head * size, v_cell * size, v_elem * (int64_t) sizeof(f16), nullptr, s.mask == MASK_F16, 0,
            s.sinks ? sinks.data() : nullptr, k_core.data(), s.k_type, v_core.data(), s.v_type, bias.data(), n_row,
            row_first.data(), row_count.data(), heads.data(), s.n_sink };
        if (s.outliers) {
            plant_outliers(r);
        }
        fill_mask(r);
        if (s.cell_type != row_type::f16) {
            a.k = quantize(k, s.d_k, k_cells);
            a.v = quantize(v, s.d_v, v_cells);
            a.k_head = row_size(s.cell_type, s.d_k);
            a.v_head = row_size(s.cell_type, s.d_v);
            a.k_cell = a.k_head * n_head_kv;
            a.v_cell = a.v_head * n_head_kv;
        }
    }

    // Rows of d values, one after the other, as cells.
    const uint8_t * quantize(const std::vector<f16> & x, int32_t d, std::vector<uint8_t> & cells) const {
        const int64_t n = (int64_t) x.size() / d;
        cells.resize(n * row_size(s.cell_type, d));
        std::vector<float> row(d);
        for (int64_t i = 0; i < n; ++i) {
            f16_to_f32_row(x.data() + i * d, row.data(), d);
            encode_row(s.cell_type, row.data(), cells.data() + i * row_size(s.cell_type, d), d);
        }
        return cells.data();
    }

    head_parts<f16> parts(int32_t h) { return { heads.data(), h, s.d_k, s.d_v, s.n_sink }; }
    uint8_t * k_row(int32_t h, int32_t i) { return k_core.data() + (row_first[h] + i) * row_size(s.k_type, s.d_k); }
    uint8_t * v_row(int32_t h, int32_t i) { return v_core.data() + (row_first[h] + i) * row_size(s.v_type, s.d_v); }

    // The i-th row of a head: the first are sinks.
    std::vector<float> key_of(int32_t h, int32_t i) {
        std::vector<float> x(s.d_k);
        if (i < s.n_sink) {
            f16_to_f32_row(parts(h).k_sink + i * s.d_k, x.data(), s.d_k);
        } else {
            load_key(s.k_type, k_row(h, i), parts(h).frame(), x.data(), s.d_k);
        }
        return x;
    }

    std::vector<float> val_of(int32_t h, int32_t i) {
        std::vector<float> x(s.d_v);
        if (i < s.n_sink) {
            f16_to_f32_row(parts(h).v_sink + i * s.d_v, x.data(), s.d_v);
        } else {
            load_value(s.v_type, v_row(h, i), x.data(), s.d_v);
        }
        return x;
    }

    void set_key(int32_t h, int32_t i, std::vector<float> x) {
        if (i < s.n_sink) {
            f32_to_f16_row(x.data(), parts(h).k_sink + i * s.d_k, s.d_k);
        } else {
            store_key(s.k_type, x.data(), parts(h).frame(), k_row(h, i), s.d_k);
        }
    }
    void set_val(int32_t h, int32_t i, std::vector<float> x) {
        if (i < s.n_sink) {
            f32_to_f16_row(x.data(), parts(h).v_sink + i * s.d_v, s.d_v);
        } else {
            store_value(s.v_type, x.data(), v_row(h, i), s.d_v);
        }
    }

    float & q_at(int32_t t, int32_t h, int32_t e) { return q[t * a.q_token + h * a.q_head + e]; }
    f16 & k_at(int32_t cell, int32_t h, int32_t e) { return k[h * k_head + cell * k_cell + e]; }
    f16 & v_at(int32_t cell, int32_t h, int32_t e) { return v[h * v_head + cell * v_cell + e * v_elem]; }

    // Key and value of a cell as they are stored.
    std::vector<float> cell_key(int32_t cell, int32_t h) {
        std::vector<float> x(s.d_k);
        decode_row(s.cell_type, a.k + h * a.k_head + cell * a.k_cell, x.data(), s.d_k);
        return x;
    }
    std::vector<float> cell_val(int32_t cell, int32_t h) {
        std::vector<float> x(s.d_v);
        for (int32_t e = 0; e < s.d_v; ++e) {
            x[e] = f16_to_f32(v_at(cell, h, e));
        }
        if (s.cell_type != row_type::f16) {
            decode_row(s.cell_type, a.v + h * a.v_head + cell * a.v_cell, x.data(), s.d_v);
        }
        return x;
    }

    float mask_at(int32_t t, int32_t cell) const {
        const int64_t i = t * a.mask_token + cell;
        return s.mask == MASK_F16 ? f16_to_f32(mask_f16[i]) : mask_f32[i];
    }

    void plant_outliers(rng & r) {
        auto grow = [](f16 & x, float by) { x = f32_to_f16(f16_to_f32(x) * by); };
        for (int32_t h = 0; h < n_head_kv; ++h) {
            for (int32_t cell = 0; cell < s.n_kv; ++cell) { // a channel that is large in every key, as models have
                k_at(cell, h, 5) = f32_to_f16(20.0f);
                grow(v_at(cell, h, 3), cell == 2 ? 2000.0f : 50.0f);
            }
            for (int32_t i = 0; i < row_count[h]; ++i) {
                std::vector<float> key = key_of(h, i), val = val_of(h, i);
                key[5] = 20.0f;
                val[3] *= 50.0f;
                set_key(h, i, key);
                set_val(h, i, val);
            }
            if (row_count[h] > s.n_sink) {
                const int32_t i = s.n_sink + r.below(row_count[h] - s.n_sink);
                bias[row_first[h] + i] = f32_to_f16(8.0f);
                std::vector<float> key = key_of(h, i);
                for (float & e : key) {
                    e *= 4.0f;
                }
                set_key(h, i, key);
            }
        }
        for (int32_t h = 0; h < n_head; ++h) {
            for (int32_t t = 0; t < s.n_tokens; ++t) {
                q_at(t, h, 5) *= 2.0f;
            }
            for (int32_t e = 0; e < s.d_k; ++e) {
                q_at(r.below(s.n_tokens), h, e) *= 8.0f;
            }
        }
    }

    // The tokens are in the last cells; cells [64, 128) belong to nobody when there are enough others, and so do some
    // at random.
    void fill_mask(rng & r) {
        mask_ld = s.n_kv + 7;
        std::vector<float> mask((size_t) s.n_tokens * mask_ld, NAN);
        const int32_t first = s.n_kv - s.n_tokens;
        for (int32_t cell = 0; cell < s.n_kv; ++cell) {
            const bool own = cell >= first;
            const bool nobody = (s.n_kv >= 200 && cell >= 64 && cell < 128) || (!own && r.below(8) == 0);
            for (int32_t t = 0; t < s.n_tokens; ++t) {
                const bool visible = !nobody && t != s.blind && (!own || cell <= first + t);
                mask[(size_t) t * mask_ld + cell] = !visible   ? -INFINITY
                                                    : s.biased ? f16_to_f32(f32_to_f16(-2.0f * (float) r.uniform()))
                                                               : 0.0f;
            }
            for (int32_t h = 0; nobody && h < n_head_kv; ++h) {
                std::generate_n(&k_at(cell, h, 0), s.d_k, [&]() { return f32_to_f16(r.below(2) ? 3e4f : -3e4f); });
                for (int32_t e = 0; e < s.d_v; ++e) {
                    v_at(cell, h, e) = f32_to_f16(r.below(2) ? 6e4f : -6e4f);
                }
            }
        }
        for (float x : mask) {
            mask_f16.push_back(x == -INFINITY ? F16_NEG_INF : f32_to_f16(x));
        }
        mask_f32 = mask;
        a.mask = s.mask == MASK_F16 ? (const void *) mask_f16.data() : mask_f32.data();
        a.mask_token = mask_ld;
    }

    size_t n_out() const { return (size_t) s.d_v * n_head * s.n_tokens; }
};

// Attention with the work in nth shares. Scratch holds what an earlier call may have left, the result NaN, so that a
// place that nobody writes is found.
std::vector<float> run(const tensors & x, int nth, bool threads = false) {
    auto each = [&](auto && f) {
        std::vector<std::thread> pool;
        for (int ith = nth - 1; ith >= 0; --ith) {
            if (threads) {
                pool.emplace_back([&f, ith]() { f(ith); });
            } else {
                f(ith);
            }
        }
        for (std::thread & t : pool) {
            t.join();
        }
    };
    std::vector<float> out(x.n_out() + 1, NAN);
    std::vector<float> work(attn_work_size(x.a, nth) + 1, 1000.0f);
    each([&](int ith) { attn_part(x.a, work.data(), out.data(), ith, nth); });
    if (attn_in_parts(x.a)) {
        each([&](int ith) { attn_reduce(x.a, work.data(), out.data(), ith, nth); });
    }
    CHECK_EQ(work.back(), 1000.0f);
    CHECK(std::isnan(out.back()));
    out.pop_back();
    return out;
}

// Output of one token and query head, and how much float32 may err on it.
//
// A logit is a sum of d_k products and errs by about sqrt(d_k) u A, A the sum of their magnitudes; the bias and the
// softcap c add 2 u (|x| + c). An error dx of the logits changes every p_i by a factor within exp(+-2 dx), so the
// output, whose terms have the magnitude V = sum p_i |v_i|, by 2 dx V. exp itself errs by 3e-7, once in p_i and once in
// their sum, the rescalings of the running softmax by about as much together, and the sum over n rows by sqrt(n) u.
// With rows in a frame and rotated the magnitudes are those of any rotation: |q.mean| and |scale q| |(k - mean)/scale|
// for A, and |v| for |v_i|.
void reference(tensors & x, int32_t t, int32_t head, std::vector<double> & out, std::vector<double> & tol) {
    const attn_args & a = x.a;
    const int32_t h = head / x.s.n_gqa;
    std::vector<double> logit;
    std::vector<std::vector<double>> value;
    double biggest = 0.0, largest = 0.0;
    std::vector<double> size;                  // of the values, where they are rotated
    std::vector<float> query(a.n_embd_head_k); // as cores see it
    for (int32_t e = 0; e < a.n_embd_head_k; ++e) {
        query[e] = x.q_at(t, head, e);
    }
    if (a.k_rotated) {
        hadamard(query.data(), a.n_embd_head_k);
    }
    auto add = [&](const std::vector<float> & key, const std::vector<float> & val, double b, bool is_core) {
        double y = 0.0, mag = 0.0, qq = 0.0, kk = 0.0, vv = 0.0;
        for (int32_t e = 0; e < a.n_embd_head_k; ++e) {
            const double q = (double) a.scale * (is_core ? query[e] : x.q_at(t, head, e)), k = key[e];
            const double mean = f16_to_f32(x.parts(h).mean[e]), in_frame = f16_to_f32(x.parts(h).scale[e]);
            y += q * k;
            mag += std::fabs(q * k);
            qq += q * q * in_frame * in_frame;
            kk += (k - mean) * (k - mean) / (in_frame * in_frame);
            if (is_core) {
                mag += std::fabs(q * mean);
            }
        }
        mag = is_core && (a.k_rotated || a.k_type != row_type::f16) ? mag + std::sqrt(qq * kk) : mag;
        y = a.softcap > 0.0f ? a.softcap * std::tanh(y / a.softcap) : y;
        logit.push_back(y + b);
        value.emplace_back(val.begin(), val.end());
        for (int32_t e = 0; e < a.n_embd_head_v; ++e) {
            vv += (double) val[e] * val[e];
        }
        size.push_back(is_core && a.v_type != row_type::f16 ? std::sqrt(vv) : 0.0);
        biggest = std::max(biggest, mag);
        largest = std::max(largest, std::fabs(y + b));
    };
    for (int32_t i = 0; i < x.row_count[h]; ++i) {
        const bool is_core = i >= x.s.n_sink;
        add(x.key_of(h, i), x.val_of(h, i), is_core ? f16_to_f32(x.bias[x.row_first[h] + i]) : 0.0, is_core);
    }
    for (int32_t cell = 0; cell < a.n_kv; ++cell) {
        const float m = x.mask_at(t, cell);
        if (m != -INFINITY) {
            add(x.cell_key(cell, h), x.cell_val(cell, h), m, false);
        }
    }
    double top = a.sinks ? a.sinks[head] : -INFINITY;
    for (double l : logit) {
        top = std::max(top, l);
    }
    double sum = a.sinks ? std::exp(a.sinks[head] - top) : 0.0;
    for (double l : logit) {
        sum += std::exp(l - top);
    }
    const double n = (double) logit.size();
    const double dx = U * (std::sqrt((double) a.n_embd_head_k) * biggest + 2.0 * (largest + a.softcap));
    out.assign(a.n_embd_head_v, 0.0);
    tol.assign(a.n_embd_head_v, 0.0);
    for (size_t i = 0; i < logit.size(); ++i) {
        const double p = std::exp(logit[i] - top) / sum;
        for (int32_t e = 0; e < a.n_embd_head_v; ++e) {
            out[e] += p * value[i][e];
            tol[e] += p * std::max(std::fabs(value[i][e]), size[i]);
        }
    }
    for (double & e : tol) {
        e = e * (2.0 * dx + 3.0 * 3e-7 + std::sqrt(n) * U) + 1e-37;
    }
}

double worst_error = 0.0; // of all cases, as a part of the tolerance

// The whole case: every share of the work gives the same bits, and these are right.
void check(const spec & s) {
    CASE("d " + std::to_string(s.d_k) + "/" + std::to_string(s.d_v) + ", gqa " + std::to_string(s.n_gqa) + ", tokens " +
         std::to_string(s.n_tokens) + ", n_kv " + std::to_string(s.n_kv) + ", seed " + std::to_string(s.seed));
    tensors x(s);
    const std::vector<float> got = run(x, 1);
    for (int nth : { 2, 3, 5, 40 }) {
        if (nth != 3 && s.n_tokens > 64) {
            continue; // slow, and cut by the same rule as fewer tokens
        }
        const std::vector<float> other = run(x, nth, nth == 3);
        CHECK_BITS(other.data(), got.data(), (int64_t) got.size());
    }
    std::vector<double> want, tol;
    for (int32_t t = 0; t < s.n_tokens; ++t) {
        if (s.n_tokens > 16 && t % 23 != 0 && t != s.blind && t != s.n_tokens - 1) {
            continue; // the float64 code is slow
        }
        for (int32_t h = 0; h < x.n_head; ++h) {
            if (s.n_tokens > 16 && (t + h) % 3 != 0) {
                continue;
            }
            reference(x, t, h, want, tol);
            const float * o = got.data() + ((size_t) t * x.n_head + h) * s.d_v;
            double worst = 0.0;
            for (int32_t e = 0; e < s.d_v; ++e) {
                const double err = std::fabs(o[e] - want[e]) / tol[e];
                worst = std::isnan(err) ? INFINITY : std::max(worst, err);
            }
            worst_error = std::max(worst_error, worst);
            if (worst > 1.0) {
                sc_test::report(false, __FILE__, __LINE__,
                    "token " + std::to_string(t) + ", head " + std::to_string(h) + ": " + sc_test::text(worst) +
                        " times the tolerance");
            }
        }
    }
    CHECK(std::all_of(got.begin(), got.end(), [](float y) { return std::isfinite(y); }));
}

void test_shapes() {
    const int32_t all_tokens[] = { 1, 2, 8, 9, 64, 300 };
    const int32_t all_gqa[] = { 1, 2, 3, 7, 8, 16 };
    const std::vector<int32_t> ragged[] = { { 130, 0, 37 }, { 64 }, { 1, 200 }, { 0 }, { 65, 3 }, { 0, 0, 129 } };
    int n = 0;
    auto one = [&](int32_t d_k, int32_t d_v, int32_t n_gqa, int32_t n_tokens) {
        spec s;
        s.d_k = d_k;
        s.d_v = d_v;
        s.n_gqa = n_gqa;
        s.n_tokens = n_tokens;
        s.cores = ragged[n % 6];
        if (n_gqa >= 7 && n_tokens >= 64) {
            s.cores.resize(1);
        }
        rng r(100 + n);
        s.n_kv = n_tokens + (r.below(3) ? 200 + r.below(60) : r.below(60));
        s.softcap = r.below(3) == 0 ? 15.0f : 0.0f;
        s.sinks = r.below(2);
        s.mask = r.below(2) ? MASK_F16 : MASK_F32;
        s.v_trans = r.below(2);
        s.q_heads = r.below(2);
        s.outliers = r.below(3) == 0;
        s.biased = r.below(3) == 0;
        s.blind = n_tokens > 1 ? n_tokens / 2 : -1;
        s.seed = ++n;
        s.n_sink = r.below(6);
        s.rotated = r.below(3) == 0;
        if (d_k % Q_BLOCK == 0 && d_v % Q_BLOCK == 0) {
            s.k_type = ALL_TYPES[r.below(5)];
            s.v_type = ALL_TYPES[r.below(5)];
            s.cell_type = s.v_trans || r.below(2) ? row_type::f16 : row_type::q8_0;
        }
        if (!s.sinks && std::count(s.cores.begin(), s.cores.end(), 0)) {
            s.blind = -1; // such a token sees nothing, see test_nothing_visible
        }
        check(s);
    };
    const int32_t sizes[][2] = { { 64, 64 }, { 80, 80 }, { 96, 96 }, { 128, 128 }, { 256, 256 }, { 96, 64 },
        { 64, 112 } };
    for (const auto & d : sizes) {
        for (int32_t n_tokens : all_tokens) {
            one(d[0], d[1], all_gqa[n % 4], n_tokens);
        }
    }
    for (int32_t n_gqa : all_gqa) {
        for (int32_t n_tokens : all_tokens) {
            one(64, 64, n_gqa, n_tokens);
        }
    }
}

// Every property by itself, for a few tokens and for a batch.
void test_properties() {
    for (int32_t n_tokens : { 1, 5, 40 }) {
        spec s;
        s.n_tokens = n_tokens;
        s.n_gqa = 3;
        s.cores = { 70, 0, 200 };
        s.n_kv = 210;
        check(s);
        spec t = s;
        t.softcap = 5.0f;
        check(t);
        t = s;
        t.sinks = true;
        check(t);
        t = s;
        t.mask = MASK_F32;
        check(t);
        t = s;
        t.v_trans = true;
        check(t);
        t = s;
        t.q_heads = true;
        check(t);
        t = s;
        t.cell_type = row_type::q8_0;
        check(t);
        t.cores = { 0, 3, 0 }; // fewer rows than sinks
        check(t);
        t = s;
        t.n_sink = 0;
        check(t);
        t.rotated = true; // and cores of f16
        check(t);
        t.k_type = row_type::iq4_nl;
        check(t);
        for (row_type k_type : ALL_TYPES) {
            for (row_type v_type : ALL_TYPES) {
                t = s;
                t.k_type = k_type;
                t.v_type = v_type;
                check(t);
                t.d_k = 96; // blocks of 32 are rotated
                t.d_v = 128;
                t.n_gqa = 9; // more query rows than registers hold at a time
                t.v_trans = t.outliers = t.sinks = true;
                check(t);
            }
        }
        t = s;
        t.outliers = true;
        check(t);
        t = s;
        t.biased = true;
        check(t);
        t = s;
        t.sinks = true;
        t.blind = n_tokens - 1;
        check(t);
        t = s;
        t.cores = { 3, 1, 2 };
        t.blind = n_tokens - 1;
        check(t); // cores alone
        t = s;
        t.cores = { 0, 0, 0 };
        check(t); // no pass has been yet
        t = s;
        t.cores = { 2 };
        t.n_kv = n_tokens;
        check(t); // fewer rows than parts
        if (n_tokens <= 2) {
            t.cores = { 30000, 20, 9000 };
            t.n_kv = 60;
            check(t); // more parts than for fewer rows
        }
        t = s;
        t.cores = { 40, 3 };
        t.n_kv = 0;
        check(t);
    }
}

// Nothing to see is no division by zero.
void test_nothing_visible() {
    for (int32_t n_tokens : { 3, 20 }) {
        for (bool sinks : { false, true }) {
            CASE("nothing visible");
            spec s;
            s.n_tokens = n_tokens;
            s.n_kv = 90;
            s.cores = { 0, 40 };
            s.sinks = sinks;
            s.blind = 1;
            const tensors x(s);
            const std::vector<float> got = run(x, 2);
            for (int32_t i = 0; i < s.n_gqa * s.d_v; ++i) {
                CHECK_EQ(got[(size_t) 1 * x.n_head * s.d_v + i], 0.0f);
            }
        }
    }
}

// A core with bias log n is n cells with the same key and value. Adding the same number n times rounds the same way
// often, so that sum errs by up to n u of values up to 4; the bias is rounded to 11 bits, half a unit of which is 2^-9
// for log 255 and moves the share by as much; all other errors are those of 20 roundings at most.
void test_log_n() {
    for (int32_t n_tokens : { 1, 16 }) {
        for (int32_t n : { 1, 2, 5, 32, 255 }) {
            CASE("log " + std::to_string(n));
            spec s;
            s.n_tokens = n_tokens;
            s.n_kv = n_tokens + 300;
            s.cores = { 1, 1 };
            s.n_sink = 0;
            tensors x(s), y(s);
            y.row_count = { 0, 0 };
            for (int32_t h = 0; h < 2; ++h) {
                x.bias[x.row_first[h]] = f32_to_f16((float) std::log((double) n));
                for (int32_t i = 0; i < n; ++i) {
                    f32_to_f16_row(x.key_of(h, 0).data(), &y.k_at(i, h, 0), s.d_k);
                    f32_to_f16_row(x.val_of(h, 0).data(), &y.v_at(i, h, 0), s.d_v);
                }
            }
            for (int32_t t = 0; t < n_tokens; ++t) {
                for (int32_t i = 0; i < n; ++i) {
                    x.mask_f16[(size_t) t * x.mask_ld + i] = F16_NEG_INF;
                    y.mask_f16[(size_t) t * y.mask_ld + i] = 0;
                }
            }
            const std::vector<float> a = run(x, 1), b = run(y, 1);
            CHECK_CLOSE(a.data(), b.data(), (int64_t) a.size(), 0.0, 4.0 * ((n + 20) * U + (n > 1 ? 0x1p-9 : 0.0)));
        }
    }
}

} // namespace

int main() {
    test_shapes();
    test_properties();
    test_nothing_visible();
    test_log_n();
    printf("largest error: %.2g of the tolerance\n", worst_error);
    return sc_test::finish();
}

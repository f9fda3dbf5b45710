// attn-case.h - calls of proportional attention, and what a slow one in float64 makes of them

#pragma once

#include "sc-attn.h"
#include "sc-quant.h"
#include "sc-test.h"

#include <algorithm>
#include <numeric>

namespace sc_test {

using namespace semcache;

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
    bool f16_tile = false;                                   // what is decoded is rounded to f16, as devices do
    bool f16_units = false;                                  // queries and shares too, as matrix units want them
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

    void decode(row_type type, const uint8_t * row, std::vector<float> & x) const {
        decode_row(type, row, x.data(), (int32_t) x.size());
        for (float & y : x) {
            y = s.f16_tile ? f16_to_f32(f32_to_f16(y)) : y;
        }
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
            decode(s.k_type, k_row(h, i), x);
            from_frame(s.k_type, parts(h).frame(), x.data(), s.d_k);
        }
        return x;
    }

    std::vector<float> val_of(int32_t h, int32_t i) {
        std::vector<float> x(s.d_v);
        if (i < s.n_sink) {
            f16_to_f32_row(parts(h).v_sink + i * s.d_v, x.data(), s.d_v);
        } else {
            decode(s.v_type, v_row(h, i), x);
            if (s.v_type != row_type::f16) {
                hadamard(x.data(), s.d_v);
            }
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
        decode(s.cell_type, a.k + h * a.k_head + cell * a.k_cell, x);
        return x;
    }
    std::vector<float> cell_val(int32_t cell, int32_t h) {
        std::vector<float> x(s.d_v);
        for (int32_t e = 0; e < s.d_v; ++e) {
            x[e] = f16_to_f32(v_at(cell, h, e));
        }
        if (s.cell_type != row_type::f16) {
            decode(s.cell_type, a.v + h * a.v_head + cell * a.v_cell, x);
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

// Output of one token and query head, and how much float32 may err on it.
//
// A logit is a sum of d_k products and errs by about sqrt(d_k) u A, A the sum of their magnitudes; the bias and the
// softcap c add 2 u (|x| + c). An error dx of the logits changes every p_i by a factor within exp(+-2 dx), so the
// output, whose terms have the magnitude V = sum p_i |v_i|, by 2 dx V. exp itself errs by 3e-7, once in p_i and once in
// their sum, the rescalings of the running softmax by about as much together, and the sum over n rows by sqrt(n) u.
// With rows in a frame and rotated the magnitudes are those of any rotation: |q.mean| and |scale q| |(k - mean)/scale|
// for A, and |v| for |v_i|.
inline void reference(tensors & x, int32_t t, int32_t head, std::vector<double> & out, std::vector<double> & tol) {
    const attn_args & a = x.a;
    const int32_t h = head / x.s.n_gqa;
    std::vector<double> logit;
    std::vector<std::vector<double>> value;
    double biggest = 0.0, largest = 0.0, rounded = 0.0; // rounded: what f16 queries may make of a logit, in 2^-11
    std::vector<double> size;                           // of the values, where they are rotated
    std::vector<float> query(a.n_embd_head_k);          // as cores see it
    for (int32_t e = 0; e < a.n_embd_head_k; ++e) {
        query[e] = x.q_at(t, head, e);
    }
    if (a.k_rotated) {
        hadamard(query.data(), a.n_embd_head_k);
    }
    auto add = [&](const std::vector<float> & key, const std::vector<float> & val, double b, bool is_core) {
        double y = 0.0, mag = 0.0, qq = 0.0, kk = 0.0, vv = 0.0, qk = 0.0;
        for (int32_t e = 0; e < a.n_embd_head_k; ++e) {
            const double q = (double) a.scale * (is_core ? query[e] : x.q_at(t, head, e)), k = key[e];
            const double mean = f16_to_f32(x.parts(h).mean[e]), in_frame = f16_to_f32(x.parts(h).scale[e]);
            y += q * k;
            mag += std::fabs(q * k);
            qk += q * k * q * k;
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
        const bool in_frame = is_core && a.k_type != row_type::f16;
        rounded = std::max(rounded, std::sqrt(in_frame ? qq * kk / a.n_embd_head_k : qk));
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
    std::vector<double> plain = tol;
    for (size_t i = 0; i < logit.size(); ++i) {
        const double p = std::exp(logit[i] - top) / sum;
        for (int32_t e = 0; e < a.n_embd_head_v; ++e) {
            out[e] += p * value[i][e];
            plain[e] += p * std::fabs(value[i][e]);
            tol[e] += p * std::max(std::fabs(value[i][e]), size[i]);
        }
    }
    const double rough = x.s.f16_units ? 0x1p-11 * (4.0 * rounded + 2.0) : 0.0;                   // of the shares too
    const double mean_plain = std::accumulate(plain.begin(), plain.end(), 0.0) / a.n_embd_head_v; // where rotated
    for (size_t e = 0; e < tol.size(); ++e) {
        tol[e] = tol[e] * (2.0 * dx + 3.0 * 3e-7 + std::sqrt(n) * U) + rough * std::max(plain[e], mean_plain) + 1e-37;
    }
}

inline double worst_error = 0.0; // of all cases, as a part of the tolerance

// Whether a result is what it should be.
inline void check_output(tensors & x, const std::vector<float> & got) {
    const spec & s = x.s;
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
                report(false, __FILE__, __LINE__,
                    "token " + std::to_string(t) + ", head " + std::to_string(h) + ": " + text(worst) +
                        " times the tolerance");
            }
        }
    }
    CHECK(std::all_of(got.begin(), got.end(), [](float y) { return std::isfinite(y); }));
}

} // namespace sc_test

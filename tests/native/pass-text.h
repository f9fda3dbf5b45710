// pass-text.h - texts that go through one kv head, pass by pass

#pragma once

#include "sc-rows.h"

#include <map>

namespace sc_test {

constexpr int32_t N_SINK = 4;

constexpr method ALL_METHODS[] = { method::semantic, method::paper, method::streaming, method::keydiff, method::knorm,
    method::snapkv, method::tova, method::h2o };

struct spec {
    method how = method::semantic;
    bool merge = true;
    int32_t distinct = DISTINCT;
    int32_t d_k = 64, d_v = 48, n_gqa = 3, n_rot = 64;
    bool neox = true;
    float softcap = 0.0f;
    int32_t n_alloc = 44, n_new = 60, n_window = 9, n_chunk = 16;
    int32_t n_sink = N_SINK;
    bool voted = false; // the stage has votes of earlier passes
};

// Exact in f16, and small beside the rest of a key.
inline float chunk_mark(int32_t chunk) { return (float) (chunk + 1) / 256.0f; }

struct text_source {
    spec s;
    rng r;
    head_shape shape;
    rope rp;
    int32_t n_past = 0, next_chunk = 0;
    std::map<int32_t, int32_t> chunk_len; // tokens of every chunk that was given out

    text_source(const spec & s, uint64_t seed) : s(s), r(seed) {
        shape = { s.d_k, s.d_v, s.n_gqa, 1.0f / std::sqrt((float) s.d_k), s.softcap };
        for (int32_t i = 0; i < s.n_rot / 2; ++i) {
            rp.inv_freq.push_back(std::pow(10000.0f, -2.0f * (float) i / (float) s.n_rot));
        }
        rp.neox = s.neox;
    }

    f16 normal(double scale, double mean = 0.0) { return f32_to_f16((float) (mean + scale * r.normal())); }

    // Tokens of a chunk have like keys that end with the number of the chunk, the same in all of them, so a row that
    // mixes two chunks shows it. Queries are 0 there, and where RoPE would turn something to it.
    tokens draw(bool first, int32_t n_new) {
        tokens t;
        t.n_sink = first ? s.n_sink : 0;
        t.n_new = n_new;
        t.n_window = s.n_window;
        std::vector<double> mean(s.d_k);
        int32_t left = 0, chunk = -1;
        for (int32_t i = 0; i < t.n(); ++i) {
            const bool cand = i >= t.n_sink && i < t.n_sink + n_new;
            if (cand && left == 0) {
                left = 1 + r.below(s.n_chunk);
                chunk = next_chunk++;
                for (double & m : mean) {
                    m = 0.7 * r.normal();
                }
            }
            if (cand) {
                t.chunk.push_back(chunk);
                --left;
            }
            for (int32_t e = 0; e < s.d_k; ++e) {
                t.k.push_back(
                    cand && e == s.d_k - 1 ? f32_to_f16(chunk_mark(chunk)) : normal(1.0, cand ? mean[e] : 0.0));
            }
            for (int32_t e = 0; e < s.d_v; ++e) {
                t.v.push_back(normal(1.0));
            }
            for (int32_t e = 0; i >= t.n_sink && e < s.n_gqa * s.d_k; ++e) {
                const int32_t at = e % s.d_k;
                const f16 x = normal(1.5);
                t.q.push_back(at >= s.d_k - 2 || at == s.d_k / 2 - 1 ? f32_to_f16(0.0f) : x);
            }
        }
        std::vector<int64_t> delta;
        const int32_t now = n_past + t.n();
        t.n_q = n_new + s.n_window;
        for (int32_t i = 0; s.voted && i < t.n(); ++i) {
            t.n_voted.push_back(r.below(4) * 20);
            t.votes.push_back({ (float) (t.n_voted.back() * s.n_gqa * 1e-6 * r.uniform()),
                (float) (t.n_voted.back() * s.n_gqa * 0.03 * r.uniform()) });
        }
        for (int32_t i = 0; i < t.n_q; ++i) {
            t.token.push_back(t.n() - t.n_q + i);
            const int32_t pos = now - t.n_q + i;
            delta.push_back((int64_t) now + look_ahead(0, pos, 512) - pos);
        }
        rp.table(delta, t.cs);
        return t;
    }

    // The stage takes up these tokens.
    void accept(const tokens & t) {
        n_past += t.n_sink + t.n_new;
        for (int32_t c : t.chunk) {
            ++chunk_len[c];
        }
    }

    pass_params params() const { return { s.how, s.merge, s.distinct }; }
};

} // namespace sc_test

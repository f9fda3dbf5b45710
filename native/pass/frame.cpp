#include "frame.h"

#include "sc-lookahead.h"

#include <cmath>

namespace semcache {

frame_scratch::frame_scratch(arena & a, const head_shape & shape) :
    mean(a.take<float>(shape.n_embd_head_k)), dev(a.take<float>(shape.n_embd_head_k)),
    ask(a.take<float>(shape.n_embd_head_k)), x(a.take<float>((int64_t) shape.n_gqa * shape.n_embd_head_k)) {}

namespace {

// Calls f(i, j, pair) with the places of both channels of every pair that RoPE turns.
template <typename F> void for_pairs(const pass_args & a, F && f) {
    for_rows(a.n_rot / 2, [&](int32_t i) {
        if (a.neox) {
            f(i, i + a.n_rot / 2, i);
        } else {
            f(2 * i, 2 * i + 1, i);
        }
    });
}

// Calls f(x) with every finite key, turned back to position 0; returns how many there are.
template <typename F> int32_t for_keys(const pass_head & h, const pass_rows & rows, float * x, F && f) {
    const int32_t d = h.a.shape.n_embd_head_k, n_sink = h.plan.n_row_sink + h.plan.n_sink;
    int32_t n = 0;
    auto take = [&](int32_t row, int32_t token) {
        const float * k = rows.k + (int64_t) row * d;
        if (!std::isfinite(dot(k, k, d))) {
            return;
        }
        std::copy_n(k, d, x);
        turn(x, h.a.back + (int64_t) token * h.a.n_rot, h.a.n_rot, h.a.neox);
        f(x);
        ++n;
    };
    for_rows(h.plan.n_new, [&](int32_t i) { take(h.n_core + i, h.plan.n_sink + i); });
    for_rows(h.plan.n_window, [&](int32_t i) { take(h.n_cand + n_sink + i, h.plan.n_sink + h.plan.n_new + i); });
    return n;
}

// Root of the sums of squares x [d] over n, the same for both channels of a pair; those that are next to nothing are
// raised.
void to_rms(const pass_args & a, int32_t n, float * x) {
    const int32_t d = a.shape.n_embd_head_k;
    for_pairs(a, [&](int32_t i, int32_t j, int32_t) { x[i] = x[j] = 0.5f * (x[i] + x[j]); });
    float most = 0.0f;
    for_rows(d, [&](int32_t e) {
        x[e] = std::sqrt(x[e] / (float) std::max(n, 1));
        most = std::max(most, x[e]);
    });
    for_rows(d, [&](int32_t e) { x[e] = most > 0.0f ? std::max(x[e], FRAME_FLOOR * most) : 1.0f; });
}

} // namespace

void make_frame(const pass_head & h, const pass_rows & rows, frame_scratch & t) {
    if (!h.a.makes_frame) {
        return;
    }
    const int32_t d = h.a.shape.n_embd_head_k, n_gqa = h.a.shape.n_gqa;
    std::fill_n(t.mean, d, 0.0f);
    std::fill_n(t.dev, d, 0.0f);
    std::fill_n(t.ask, d, 0.0f);
    const int32_t n = for_keys(h, rows, t.x, [&](const float * k) { axpy(1.0f, k, t.mean, d); });
    for_rows(d, [&](int32_t e) { t.mean[e] /= (float) std::max(n, 1); });
    for_keys(h, rows, t.x,
        [&](const float * k) { for_rows(d, [&](int32_t e) { t.dev[e] += (k[e] - t.mean[e]) * (k[e] - t.mean[e]); }); });
    for_pairs(h.a, [&](int32_t i, int32_t j, int32_t pair) {
        const float c = h.a.mean_turn[2 * pair], s = h.a.mean_turn[2 * pair + 1], a = t.mean[i], b = t.mean[j];
        const float lost = (float) n * 0.5f * std::max(0.0f, 1.0f - c * c - s * s) * (a * a + b * b);
        t.dev[i] += lost;
        t.dev[j] += lost;
    });
    turn(t.mean, h.a.mean_turn, h.a.n_rot, h.a.neox);
    to_rms(h.a, n, t.dev);

    int32_t n_query = 0;
    for_rows(h.plan.n_voter, [&](int32_t v) {
        h.load_query(v, t.x);
        for_rows(n_gqa, [&](int32_t g) {
            const float * q = t.x + (int64_t) g * d;
            if (std::isfinite(dot(q, q, d))) {
                for_rows(d, [&](int32_t e) { t.ask[e] += q[e] * q[e]; });
                ++n_query;
            }
        });
    });
    if (n_query > 0) {
        to_rms(h.a, n_query, t.ask);
    } else {
        for_rows(d, [&](int32_t e) { t.ask[e] = 1.0f / t.dev[e]; });
    }

    // stored values are about 1
    const float unit = std::sqrt(dot(t.dev, t.ask, d) / (float) d);
    const head_parts<f16> parts = h.parts();
    for_rows(d, [&](int32_t e) {
        parts.mean[e] = f32_to_f16(t.mean[e]);
        const float scale = unit * std::sqrt(t.dev[e] / t.ask[e]);
        parts.scale[e] = f32_to_f16(scale >= FRAME_MIN ? std::min(scale, FRAME_MAX) : FRAME_MIN); // NaN is no scale
    });
}

} // namespace semcache

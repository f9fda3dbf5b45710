#include "sc-calibrate.h"

#include "sc-vec.h"

#include <algorithm>
#include <cmath>

namespace semcache {

namespace {

// Rows in f32: some that every probe sees, then the text's exact tokens, of which a probe sees those up to itself.
struct exact_rows {
    std::vector<float> k, v, bias; // [n, n_embd_head_k], [n, n_embd_head_v], [n]
    int32_t n = 0;

    exact_rows(const head_shape & shape, int32_t n_max) : k((size_t) n_max*shape.n_embd_head_k), v((size_t) n_max*shape.n_embd_head_v), bias(n_max) {}

    void add_token(const stage_rows & stage, const head_shape & shape, int32_t t) {
        f16_to_f32_row(stage.k + stage.cell[t]*stage.k_cell, k.data() + (size_t) n*shape.n_embd_head_k, shape.n_embd_head_k);
        load_value(stage, shape, t, v.data() + (size_t) n*shape.n_embd_head_v);
        bias[n++] = 0.0f;
    }

    void add_core(const head_rows & rows, const head_shape & shape, int32_t i) {
        const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
        f16_to_f32_row(rows.k + (int64_t) i*d_k, k.data() + (size_t) n*d_k, d_k);
        f16_to_f32_row(rows.v + (int64_t) i*d_v, v.data() + (size_t) n*d_v, d_v);
        bias[n++] = rows.bias[i];
    }
};

// Output [n_embd_head_v] of one query that sees the first n_see rows; p [n_see] is scratch.
void attend(const float * q, const exact_rows & rows, int32_t n_see, const head_shape & shape, float * p, float * out) {
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    float mx = -INFINITY;
    for (int32_t i = 0; i < n_see; ++i) {
        const float x = dot(q, rows.k.data() + (size_t) i*d_k, d_k);
        p[i] = (shape.softcap > 0.0f ? shape.softcap*std::tanh(x/shape.softcap) : x) + rows.bias[i];
        mx   = std::max(mx, p[i]);
    }
    float sum = 0.0f;
    for (int32_t i = 0; i < n_see; ++i) {
        p[i] = std::exp(p[i] - mx);
        sum += p[i];
    }
    std::fill(out, out + d_v, 0.0f);
    for (int32_t i = 0; i < n_see; ++i) {
        axpy(p[i]/sum, rows.v.data() + (size_t) i*d_v, out, d_v);
    }
}

// What one pass over the text sees, and the turn of its queries that stage.cs points to.
struct text_pass {
    stage_rows         stage;
    std::vector<float> cs;
};

std::vector<text_pass> passes_of(const text_rows & text, const rope & r, const calibrate_params & params) {
    const stage_rows & all = text.rows;
    const int32_t n_past = all.n_sink + all.n_new;
    std::vector<text_pass> res;
    std::vector<int64_t>   delta;
    for (int32_t begin = 0, end; begin < n_past; begin = end) {
        text_pass pass = { all, {} };
        stage_rows & stage = pass.stage;
        stage.n_sink   = begin == 0 ? all.n_sink : 0;
        end            = std::min(begin + stage.n_sink + params.n_pass, n_past);
        stage.n_new    = end - begin - stage.n_sink;
        stage.n_window = params.n_window;
        stage.cell     = all.cell  + begin;
        stage.chunk    = all.chunk + begin + stage.n_sink - all.n_sink;
        const int64_t now = (int64_t) text.pos[end + params.n_window - 1] + 1;
        delta.clear();
        for (int32_t t = begin + stage.n_sink; t < end + params.n_window; ++t) {
            delta.push_back(now + look_ahead(params.seed, text.pos[t], params.n_horizon) - text.pos[t]);
        }
        r.table(delta, pass.cs);
        stage.cs = pass.cs.data();
        res.push_back(std::move(pass)); // moving a vector leaves its data where it is
    }
    return res;
}

} // namespace

std::vector<double> output_errors(const text_rows & text, const head_shape & shape, const rope & r, const calibrate_params & params,
                                  const std::vector<double> & parts, pass_workspace & ws) {
    const stage_rows & all = text.rows;
    const int32_t d_k    = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    const int32_t n_past = all.n_sink + all.n_new;
    const int32_t n_text = n_past + all.n_window;

    // the probes' queries, with the scale of the logits in them, and their exact outputs
    std::vector<int32_t> probes;
    for (int32_t t = n_text - text.n_probe; t < n_text; t += params.n_skip) {
        probes.push_back(t);
    }
    const size_t n_query = probes.size()*shape.n_gqa;
    std::vector<float> q(n_query*d_k), exact(n_query*d_v), p(n_text), out(d_v);
    for (size_t i = 0; i < probes.size(); ++i) {
        load_query(all, shape, probes[i], q.data() + i*shape.n_gqa*d_k);
    }
    for (float & x : q) {
        x *= shape.scale;
    }
    exact_rows rows(shape, n_text);
    for (int32_t t = 0; t < n_text; ++t) {
        rows.add_token(all, shape, t);
    }
    auto n_see = [&](size_t i) { return rows.n - (n_text - 1 - probes[i/shape.n_gqa]); };
    for (size_t i = 0; i < n_query; ++i) {
        attend(q.data() + i*d_k, rows, n_see(i), shape, p.data(), exact.data() + i*d_v);
    }

    const std::vector<text_pass> passes = passes_of(text, r, params);
    std::vector<double> res;
    for (const double part : parts) {
        const int32_t n_alloc = std::max(all.n_sink + 1, (int32_t) std::llround(part*n_past));
        std::vector<f16>       k((size_t) n_alloc*d_k), v((size_t) n_alloc*d_v);
        std::vector<float>     bias(n_alloc);
        std::vector<core_meta> meta(n_alloc);
        head_rows cores = { k.data(), v.data(), bias.data(), meta.data(), n_alloc, 0, 0 };
        for (const text_pass & pass : passes) {
            const int32_t n_query_tok = pass.stage.n_new + pass.stage.n_window;
            ws.reserve(shape, cores.n_used + pass.stage.n_sink + n_query_tok, n_query_tok*shape.n_gqa);
            compress_head(cores, pass.stage, shape, r, params.pass, ws);
        }
        rows.n = 0;
        for (int32_t i = 0; i < cores.n_used; ++i) {
            rows.add_core(cores, shape, i);
        }
        for (int32_t t = n_past; t < n_text; ++t) {
            rows.add_token(all, shape, t);
        }
        double sum = 0.0;
        for (size_t i = 0; i < n_query; ++i) {
            attend(q.data() + i*d_k, rows, n_see(i), shape, p.data(), out.data());
            axpy(-1.0f, exact.data() + i*d_v, out.data(), d_v);
            sum += dot(out.data(), out.data(), d_v);
        }
        res.push_back(sum/(double) n_query);
    }
    return res;
}

} // namespace semcache

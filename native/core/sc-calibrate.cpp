#include "sc-calibrate.h"

#include "sc-quant.h"

#include <algorithm>
#include <cmath>

namespace semcache {

namespace {

// Rows in f32: some that every probe sees, then the text's exact tokens, of which a probe sees those up to itself.
struct exact_rows {
    std::vector<float> k, v, bias; // [n, n_embd_head_k], [n, n_embd_head_v], [n]
    int32_t n = 0;

    exact_rows(const head_shape & shape, int32_t n_max) :
        k((size_t) n_max * shape.n_embd_head_k), v((size_t) n_max * shape.n_embd_head_v), bias(n_max) {}

    void add_token(const stage_rows & stage, const head_shape & shape, int32_t t) {
        f16_to_f32_row(
            stage.k + stage.cell[t] * stage.k_cell, k.data() + (size_t) n * shape.n_embd_head_k, shape.n_embd_head_k);
        load_value(stage, shape, t, v.data() + (size_t) n * shape.n_embd_head_v);
        bias[n++] = 0.0f;
    }

    void add_core(const head_rows & rows, const head_shape & shape, int32_t i) {
        const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
        load_row(rows.k_type, rows.k + i * row_size(rows.k_type, d_k), k.data() + (size_t) n * d_k, d_k);
        load_row(rows.v_type, rows.v + i * row_size(rows.v_type, d_v), v.data() + (size_t) n * d_v, d_v);
        bias[n++] = rows.bias[i];
    }
};

// Output [n_embd_head_v] of one query that sees the first n_see rows; p [n_see] is scratch.
void attend(const float * q, const exact_rows & rows, int32_t n_see, const head_shape & shape, float * p, float * out) {
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    float mx = -INFINITY;
    for (int32_t i = 0; i < n_see; ++i) {
        const float x = dot(q, rows.k.data() + (size_t) i * d_k, d_k);
        p[i] = (shape.softcap > 0.0f ? shape.softcap * std::tanh(x / shape.softcap) : x) + rows.bias[i];
        mx = std::max(mx, p[i]);
    }
    float sum = 0.0f;
    for (int32_t i = 0; i < n_see; ++i) {
        p[i] = std::exp(p[i] - mx);
        sum += p[i];
    }
    std::fill(out, out + d_v, 0.0f);
    for (int32_t i = 0; i < n_see; ++i) {
        axpy(p[i] / sum, rows.v.data() + (size_t) i * d_v, out, d_v);
    }
}

// What one pass over the text sees, and what its queries and stage point to.
struct text_pass {
    stage_rows stage;
    query_rows queries;
    std::vector<int32_t> voter; // rows of those whose queries vote
    std::vector<float> cs;
    std::vector<int32_t> n_voted; // of the stage's tokens
};

std::vector<text_pass> passes_of(const text_rows & text, const rope & r, const calibrate_params & params) {
    const stage_rows & all = text.rows;
    const int32_t n_read = all.n_sink + all.n_new + params.n_window; // probes are not read
    std::vector<text_pass> res;
    std::vector<int64_t> delta;
    std::vector<int32_t> n_voted(n_read, 0); // by token
    int32_t done = 0;                        // tokens that went into the cores
    for (int32_t begin = 0, end; begin < n_read; begin = end) {
        text_pass pass = { all, text.queries, {}, {}, {} };
        end = std::min(begin + params.n_pass, n_read);
        const int32_t n_sink = done == 0 ? all.n_sink : 0, stop = std::max(done, end - params.n_window);
        stage_rows & stage = pass.stage;
        stage.n_sink = stop > done + n_sink ? n_sink : 0;
        stage.n_new = stop > done + n_sink ? stop - done - n_sink : 0;
        stage.n_window = end - done - stage.n_sink - stage.n_new;
        stage.cell = all.cell + done;
        stage.chunk = all.chunk + std::max(done - all.n_sink, 0);
        pass.n_voted.assign(n_voted.begin() + done, n_voted.begin() + end);
        stage.n_voted = pass.n_voted.data();
        const int64_t now = (int64_t) text.pos[end - 1] + 1 + params.n_window;
        delta.clear();
        for (int32_t t = begin; t < end; t += VOTE_EVERY) {
            pass.voter.push_back(text.queries.row[t]);
            delta.push_back(now + look_ahead(params.seed, text.pos[t], params.n_horizon) - text.pos[t]);
        }
        r.table(delta, pass.cs);
        pass.queries.row = pass.voter.data();
        pass.queries.n = (int32_t) pass.voter.size();
        pass.queries.cs = pass.cs.data();
        done += stage.n_sink + stage.n_new;
        for (int32_t t = done; t < end; ++t) {
            n_voted[t] += pass.queries.n;
        }
        res.push_back(std::move(pass)); // moving a vector leaves its data where it is
    }
    return res;
}

} // namespace

std::vector<double> output_errors(const text_rows & text, const head_shape & shape, const rope & r,
    const calibrate_params & params, const std::vector<double> & parts, pass_workspace & ws) {
    const stage_rows & all = text.rows;
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    const int32_t n_past = all.n_sink + all.n_new;
    const int32_t n_text = n_past + all.n_window;

    // the probes' queries, with the scale of the logits in them, and their exact outputs
    std::vector<int32_t> probes;
    for (int32_t t = n_text - text.n_probe; t < n_text; t += params.n_skip) {
        probes.push_back(t);
    }
    const size_t n_query = probes.size() * shape.n_gqa;
    std::vector<float> q(n_query * d_k), exact(n_query * d_v), p(n_text), out(d_v);
    for (size_t i = 0; i < probes.size(); ++i) {
        load_query(text.queries, shape, probes[i], q.data() + i * shape.n_gqa * d_k);
    }
    for (float & x : q) {
        x *= shape.scale;
    }
    exact_rows rows(shape, n_text);
    for (int32_t t = 0; t < n_text; ++t) {
        rows.add_token(all, shape, t);
    }
    auto n_see = [&](size_t i) { return rows.n - (n_text - 1 - probes[i / shape.n_gqa]); };
    for (size_t i = 0; i < n_query; ++i) {
        attend(q.data() + i * d_k, rows, n_see(i), shape, p.data(), exact.data() + i * d_v);
    }

    const std::vector<text_pass> passes = passes_of(text, r, params);
    std::vector<token_votes> votes(1 + *std::max_element(all.cell, all.cell + n_text));
    std::vector<double> res;
    for (const double part : parts) {
        const int32_t n_alloc = std::max(all.n_sink + 1, (int32_t) std::llround(part * n_past));
        constexpr row_type type = row_type::f16; // a profile is of the model, not of the type of the rows
        std::vector<uint8_t> k(n_alloc * row_size(type, d_k)), v(n_alloc * row_size(type, d_v));
        std::vector<float> bias(n_alloc);
        std::vector<core_meta> meta(n_alloc);
        head_rows cores = { k.data(), v.data(), bias.data(), meta.data(), n_alloc, 0, 0, type, type };
        for (const text_pass & pass : passes) {
            stage_rows stage = pass.stage;
            stage.votes = votes.data();
            ws.reserve(shape, cores.n_used + stage.n_sink + stage.n_new + stage.n_window, stage.n_new, pass.queries.n);
            compress_head(cores, stage, pass.queries, shape, r, params.pass, ws);
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
            attend(q.data() + i * d_k, rows, n_see(i), shape, p.data(), out.data());
            axpy(-1.0f, exact.data() + i * d_v, out.data(), d_v);
            sum += dot(out.data(), out.data(), d_v);
        }
        res.push_back(sum / (double) n_query);
    }
    return res;
}

} // namespace semcache

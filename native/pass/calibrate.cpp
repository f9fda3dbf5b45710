#include "calibrate.h"

#include "head.h"
#include "pass.h"

#include <cmath>

namespace semcache {

namespace {

// Rows in f32: some that every probe sees, then the text's exact tokens, of which a probe sees those up to itself.
struct exact_rows {
    std::vector<float> k, v, bias; // [n, n_embd_head_k], [n, n_embd_head_v], [n]
    int32_t n = 0;

    exact_rows(const head_shape & shape, int32_t n_max) :
        k((size_t) n_max * shape.n_embd_head_k), v((size_t) n_max * shape.n_embd_head_v), bias(n_max) {}

    void add_token(const pass_head & h, int32_t t) {
        h.load_token_key(t, k.data() + (size_t) n * h.a.shape.n_embd_head_k);
        h.load_token_value(t, v.data() + (size_t) n * h.a.shape.n_embd_head_v);
        bias[n++] = 0.0f;
    }

    void add_core(const pass_head & h, int32_t i) {
        h.load_core_key(i, k.data() + (size_t) n * h.a.shape.n_embd_head_k);
        h.load_core_value(i, v.data() + (size_t) n * h.a.shape.n_embd_head_v);
        bias[n++] = h.bias(i);
    }
};

// Output [n_embd_head_v] of one query that sees the first n_see rows; p [n_see] is scratch.
void attend(const float * q, const exact_rows & rows, int32_t n_see, const head_shape & shape, float * p, float * out) {
    const int32_t d_k = shape.n_embd_head_k, d_v = shape.n_embd_head_v;
    for (int32_t i = 0; i < n_see; ++i) {
        const float x = dot(q, rows.k.data() + (size_t) i * d_k, d_k);
        p[i] = (shape.softcap > 0.0f ? shape.softcap * std::tanh(x / shape.softcap) : x) + rows.bias[i];
    }
    const float sum = exp_all(p, n_see);
    std::fill(out, out + d_v, 0.0f);
    for (int32_t i = 0; i < n_see; ++i) {
        axpy(p[i] / sum, rows.v.data() + (size_t) i * d_v, out, d_v);
    }
}

// One pass over the text: its plan, and what that points to.
struct text_pass {
    pass_plan plan;
    std::vector<int32_t> voter_row, voter_token, n_voted;
    std::vector<float> turn;
};

pass_plan plan_of(const calibrate_text & text, const calibrate_params & params) {
    pass_plan plan = {};
    plan.how = method::semantic;
    plan.merge = params.merge;
    plan.distinct = params.distinct;
    plan.cell = text.cell;
    plan.voter_row = text.ring_row;
    return plan;
}

std::vector<text_pass> passes_of(const calibrate_text & text, const calibrate_params & params) {
    const int32_t n_read = text.n_past + params.n_window; // probes are not read
    std::vector<text_pass> res;
    std::vector<int32_t> n_voted(n_read, 0);
    int32_t done = 0; // tokens that went into the cores
    for (int32_t begin = 0, end; begin < n_read; begin = end) {
        text_pass pass = { plan_of(text, params), {}, {}, {}, {} };
        pass_plan & plan = pass.plan;
        end = std::min(begin + params.n_pass, n_read);
        const int32_t n_sink = done == 0 ? text.n_sink : 0, stop = std::max(done, end - params.n_window);
        plan.n_row_sink = done == 0 ? 0 : text.n_sink;
        plan.n_sink = stop > done + n_sink ? n_sink : 0;
        plan.n_new = stop > done + n_sink ? stop - done - n_sink : 0;
        plan.n_window = end - done - plan.n_sink - plan.n_new;
        plan.cell = text.cell + done;
        plan.chunk = text.chunk + std::max(done - text.n_sink, 0);
        pass.n_voted.assign(n_voted.begin() + done, n_voted.begin() + end);
        plan.n_voted = pass.n_voted.data();
        const int64_t now = (int64_t) text.pos[end - 1] + 1 + params.n_window;
        std::vector<int64_t> delta;
        for (int32_t t = begin; t < end; t += VOTE_EVERY) {
            pass.voter_row.push_back(text.ring_row[t]);
            pass.voter_token.push_back(t - done);
            delta.push_back(now + look_ahead(params.seed, text.pos[t], params.n_horizon) - text.pos[t]);
        }
        text.turns->table(delta, pass.turn);
        plan.voter_row = pass.voter_row.data();
        plan.voter_token = pass.voter_token.data();
        plan.n_voter = (int32_t) pass.voter_row.size();
        done += plan.n_sink + plan.n_new;
        for (int32_t t = done; t < end; ++t) {
            n_voted[t] += plan.n_voter;
        }
        res.push_back(std::move(pass)); // moving a vector leaves its data where it is
    }
    return res;
}

// Rows of one head in f16: a profile is of the model, not of the type of the rows.
struct own_rows {
    std::vector<uint8_t> k, v;
    std::vector<f16> bias, s_use, heads;
    std::vector<float> vote_p4, vote_p;
    std::vector<int32_t> origin, row_first, row_count;
    pass_args args;

    own_rows(const calibrate_text & text, int32_t ih, int32_t n_alloc) : args(*text.layer) {
        constexpr row_type type = row_type::f16;
        const int64_t n_cell = 1 + *std::max_element(text.cell, text.cell + text.n_token);
        auto make = [](auto & x, int64_t n) {
            x.resize(n);
            return x.data();
        };
        args.k = make(k, n_alloc * row_size(type, args.shape.n_embd_head_k));
        args.v = make(v, n_alloc * row_size(type, args.shape.n_embd_head_v));
        args.k_type = args.v_type = type;
        args.bias = make(bias, n_alloc);
        args.s_use = make(s_use, n_alloc);
        args.s_policy = nullptr; // budgets are measured by our own method
        args.origin = make(origin, n_alloc);
        args.n_row = n_alloc;
        make(row_first, args.n_head_kv);
        std::fill(row_first.begin() + ih + 1, row_first.end(), n_alloc);
        args.row_first = row_first.data();
        args.row_count = make(row_count, args.n_head_kv);
        args.n_sink = text.n_sink;
        args.heads =
            make(heads, args.n_head_kv * head_size(args.shape.n_embd_head_k, args.shape.n_embd_head_v, args.n_sink));
        args.vote_p4 = make(vote_p4, n_cell);
        args.vote_p = make(vote_p, n_cell);
        args.vote_head = 0;
    }
};

// The probes' queries, what they see of the text, and their exact outputs.
struct probes {
    std::vector<int32_t> token;
    std::vector<float> q, exact; // [n_probe, n_gqa, n_embd_head_k] with the scale of the logits in them, and _v
    head_shape shape;

    probes(const pass_head & text, const calibrate_params & params) : shape(text.a.shape) {
        const int32_t n = text.plan.n_token();
        for (int32_t t = n - params.n_probe; t < n; t += params.n_skip) {
            token.push_back(t);
        }
        q.resize(token.size() * shape.n_gqa * shape.n_embd_head_k);
        for (size_t i = 0; i < token.size(); ++i) {
            text.load_query(token[i], q.data() + i * shape.n_gqa * shape.n_embd_head_k);
        }
        for (float & x : q) {
            x *= shape.scale;
        }
        exact_rows rows(shape, n);
        for_rows(n, [&](int32_t t) { rows.add_token(text, t); });
        exact.resize(token.size() * shape.n_gqa * shape.n_embd_head_v);
        outputs(rows, n, [&](size_t i, const float * out) {
            std::copy_n(out, shape.n_embd_head_v, exact.data() + i * shape.n_embd_head_v);
        });
    }

    // Calls f(i, out) with the output of every query over these rows, which end with the text's last token.
    template <typename F> void outputs(const exact_rows & rows, int32_t n_text, F && f) const {
        std::vector<float> p(rows.n), out(shape.n_embd_head_v);
        for (size_t i = 0; i < token.size() * shape.n_gqa; ++i) {
            const int32_t n_see = rows.n - (n_text - 1 - token[i / shape.n_gqa]);
            attend(q.data() + i * shape.n_embd_head_k, rows, n_see, shape, p.data(), out.data());
            f(i, out.data());
        }
    }

    double error(const exact_rows & rows, int32_t n_text) const {
        double sum = 0.0;
        std::vector<float> off(shape.n_embd_head_v);
        outputs(rows, n_text, [&](size_t i, const float * out) {
            std::copy_n(out, shape.n_embd_head_v, off.data());
            axpy(-1.0f, exact.data() + i * shape.n_embd_head_v, off.data(), shape.n_embd_head_v);
            sum += dot(off.data(), off.data(), shape.n_embd_head_v);
        });
        return sum / (double) (token.size() * shape.n_gqa);
    }
};

} // namespace

std::vector<double> output_errors(
    const calibrate_text & text, int32_t ih, const calibrate_params & params, const std::vector<double> & parts) {
    pass_plan whole = plan_of(text, params);
    whole.n_window = text.n_token;
    own_rows none(text, ih, 0);
    const pass_head exact(none.args, whole, ih);
    const probes asked(exact, params);
    const std::vector<text_pass> passes = passes_of(text, params);
    std::vector<uint8_t> scratch;
    std::vector<double> res;
    for (const double part : parts) {
        own_rows cores(text, ih, std::max(text.n_sink + 1, (int32_t) std::llround(part * text.n_past)));
        for (const text_pass & pass : passes) {
            pass_args args = cores.args;
            args.turn = pass.turn.data();
            args.n_rot = 2 * (int32_t) text.turns->inv_freq.size();
            args.neox = text.turns->neox;
            const pass_sizes n = { args.row_count[ih] + pass.plan.n_token(), pass.plan.n_new, pass.plan.n_voter };
            scratch.resize(std::max(scratch.size(), pass_scratch_size(args.shape, n) + arena::ALIGNMENT));
            compress_head(args, pass.plan, ih, arena::align(scratch.data()));
        }
        exact_rows rows(cores.args.shape, cores.row_count[ih] + text.n_token - text.n_past);
        pass_plan after = whole;
        after.n_row_sink = text.n_sink;
        const pass_head h(cores.args, after, ih);
        for_rows(cores.row_count[ih], [&](int32_t i) { rows.add_core(h, i); });
        for (int32_t t = text.n_past; t < text.n_token; ++t) {
            rows.add_token(h, t);
        }
        res.push_back(asked.error(rows, text.n_token));
    }
    return res;
}

} // namespace semcache

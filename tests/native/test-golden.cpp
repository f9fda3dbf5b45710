// The core against the files of tests/golden, which the numpy reference wrote; their layouts are in make_golden.py.

#include "pass/calibrate.h"
#include "pass/score.h"
#include "sc-chunk.h"
#include "sc-profile.h"
#include "sc-rows.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <unistd.h>

using namespace sc_test;

namespace {

// The reference computes in float64, the core in float32 (u = 6e-8). The error of a logit, of the order of sqrt(d_k) u
// times its largest terms (9 * 6e-8 * 40 = 2e-5 with the outliers), is the relative error of a probability; 2e-6 was
// seen. Below PROB_FLOOR the core may take a probability as 0.
constexpr double SCORE_RTOL = 2e-5;
constexpr double PROB_FLOOR = 1e-12;
constexpr double EVICT_ATOL = 1e-6; // cosines near 0
constexpr double BIAS_ATOL = 1e-5;  // a mean of many logits' errors; 3e-7 was seen
// A merged row is stored as f16, half a unit in the last place is 2^-11 = 4.88e-4 of it. Before that it is a mean of
// values up to 40 in float32 with weights that err as above; 1e-5 of them is what a value near 0 may show.
constexpr double ROW_RTOL = 4.95e-4;
// Biases and scores are stored likewise; the smallest scores are multiples of 2^-24.
constexpr double F16_RTOL = 4.95e-4, F16_ATOL = 0x1p-25;
constexpr double ROW_ATOL = 2e-5;

std::string golden_dir;

std::string read_file(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    CHECK(in.good());
    return std::string(std::istreambuf_iterator<char>(in), {});
}

struct golden {
    int32_t how, d_k, d_v, gqa, n_rot, neox, n_sink, n_core, n_new, n_win, n_past, n_horizon, budget, merge, n_out,
        n_merged, n_dropped, n_q, n_ahead, n_full, distinct;
    uint64_t seed;
    float scale, softcap;
    std::vector<int32_t> pos_q, chunk, n_tok, votes_n, u, winner, member_of, out_chunk, out_n_tok;
    std::vector<float> inv_freq, s_use, bias, k, v, q, votes_p4, votes_p, score_s_use, score_s_dev, score_w, taken_p4,
        taken_p;
    std::vector<float> out_s_use, out_bias, out_k, out_v;

    int32_t n_cand() const { return n_core + n_new; }
    int32_t n_stage() const { return n_new + n_win; }

    bool read(const std::string & path) {
        const std::string bytes = read_file(path);
        size_t at = 0;
        auto words = [&](auto & out, size_t n) {
            out.resize(n);
            if (n > 0 && at + 4 * n <= bytes.size()) {
                memcpy(out.data(), bytes.data() + at, 4 * n);
            }
            at += 4 * n;
        };
        std::vector<uint32_t> h;
        words(h, 32);
        CHECK_EQ(h[0], 0x43474353u);
        CHECK_EQ(h[1], 5u);
        if (h[0] != 0x43474353u || h[1] != 5) {
            return false;
        }
        int32_t * const fields[] = { &how, &d_k, &d_v, &gqa, &n_rot, &neox, &n_sink, &n_core, &n_new, &n_win, &n_past,
            &n_horizon };
        for (size_t i = 0; i < 12; ++i) {
            *fields[i] = (int32_t) h[2 + i];
        }
        seed = h[14] | (uint64_t) h[15] << 32;
        budget = (int32_t) h[16];
        merge = (int32_t) h[17];
        n_out = (int32_t) h[18];
        n_merged = (int32_t) h[19];
        n_dropped = (int32_t) h[20];
        n_q = (int32_t) h[22];
        n_ahead = (int32_t) h[23];
        n_full = (int32_t) h[24];
        distinct = (int32_t) h[25];

        std::vector<float> two;
        const size_t n_rows = n_sink + n_cand() + n_win;
        words(two, 2);
        scale = two[0];
        softcap = two[1];
        words(inv_freq, n_rot / 2);
        words(pos_q, n_q);
        words(chunk, n_cand());
        words(n_tok, n_core);
        words(s_use, n_core);
        words(bias, n_rows);
        words(k, n_rows * d_k);
        words(v, n_rows * d_v);
        words(q, (size_t) n_q * gqa * d_k);
        words(votes_n, n_stage());
        words(votes_p4, n_stage());
        words(votes_p, n_stage());
        words(u, n_q);
        words(score_s_use, n_cand());
        words(score_s_dev, n_cand());
        words(score_w, n_cand());
        words(taken_p4, n_stage());
        words(taken_p, n_stage());
        words(winner, n_out);
        words(member_of, n_cand());
        words(out_chunk, n_out);
        words(out_n_tok, n_out);
        words(out_s_use, n_out);
        words(out_bias, n_out);
        words(out_k, (size_t) n_out * d_k);
        words(out_v, (size_t) n_out * d_v);
        CHECK_EQ(bytes.size(), at);
        return bytes.size() == at;
    }
};

// Rows of the case that are in the head before the pass; in a first pass none, the sinks are then in the stage.
head_store head_of(const golden & g, const head_shape & shape, bool first) {
    const int32_t n = first ? 0 : g.n_sink + g.n_core;
    head_store h(
        shape, g.n_sink + g.budget, n, row_type::f16, g.n_sink); // some cases hold more cores than their budget
    h.n_sink = first ? 0 : g.n_sink;
    h.n_used = n;
    const std::vector<f16> k = to_f16(g.k), v = to_f16(g.v), bias = to_f16(g.bias);
    for (int32_t i = 0; i < n; ++i) {
        std::copy_n(k.begin() + (size_t) i * g.d_k, g.d_k, h.key(i));
        std::copy_n(v.begin() + (size_t) i * g.d_v, g.d_v, h.val(i));
        h.bias[i] = bias[i];
        const int32_t c = i - g.n_sink;
        h.set_meta(i, c < 0 ? row_meta{} : row_meta{ g.s_use[c], g.chunk[c], g.n_tok[c] });
    }
    return h;
}

bool evicts(const golden & g) { return semcache::evicts((method) g.how); }

tokens stage_of(const golden & g, const rope & r, bool first) {
    tokens t;
    t.n_sink = first ? g.n_sink : 0;
    t.n_new = g.n_new;
    t.n_window = g.n_win;
    t.n_full = g.n_full;
    const size_t skip = first ? 0 : g.n_sink + g.n_core; // rows of the file that are in the head
    t.k = to_f16({ g.k.begin() + skip * g.d_k, g.k.end() });
    t.v = to_f16({ g.v.begin() + skip * g.d_v, g.v.end() });
    t.q = to_f16(g.q);
    t.n_q = g.n_q;
    t.votes.resize(t.n_sink);
    t.n_voted.resize(t.n_sink);
    for (int32_t i = 0; i < g.n_stage(); ++i) {
        t.votes.push_back({ g.votes_p4[i], g.votes_p[i] });
        t.n_voted.push_back(g.votes_n[i]);
    }
    t.chunk.assign(g.chunk.begin() + g.n_core, g.chunk.end());
    std::vector<int64_t> delta(g.n_q);
    for (int32_t i = 0; i < g.n_q; ++i) {
        delta[i] =
            evicts(g) ? 0 : (int64_t) g.n_past + g.n_ahead + look_ahead(g.seed, g.pos_q[i], g.n_horizon) - g.pos_q[i];
        t.token.push_back(t.n() - (g.n_past - g.pos_q[i]));
    }
    r.table(delta, t.cs);
    return t;
}

void check_case(const golden & g, const std::string & name, bool first, const layout & l) {
    CASE(name + (first ? ", first" : "") + (l.v_trans ? ", transposed" : "") + (l.shuffle ? ", shuffled" : ""));
    const head_shape shape = { g.d_k, g.d_v, g.gqa, g.scale, g.softcap };
    const rope r = { g.inv_freq, g.neox != 0 };
    const pass_params params = { (method) g.how, g.merge != 0, g.distinct };
    head_store h = head_of(g, shape, first);
    const tokens t = stage_of(g, r, first);

    if (params.how == method::semantic) {
        stage_store fresh(t, shape, l);
        const pass_call call(h, fresh, r, params);
        const pass_head head(call.args, call.plan, call.ih);
        CHECK_EQ(head.n_cand, g.n_cand());
        const pass_sizes n = { head.n_rows, 0, head.plan.n_voter };
        arena count;
        pass_rows(count, shape, n), pass_scores(count, shape, n), score_scratch(count, shape, n);
        std::vector<uint8_t> memory(count.size() + arena::ALIGNMENT);
        arena a(arena::align(memory.data()));
        pass_rows rows(a, shape, n);
        pass_scores scores(a, shape, n);
        score_scratch scratch(a, shape, n);
        load_rows(head, rows);
        load_queries(head, fit_stride(call.plan.n_voter, call.args.shape.n_gqa), rows);
        score_rows(head, rows, false, scores, scratch);
        for (int32_t i = 0; i < g.n_stage(); ++i) {
            const token_votes got = fresh.votes_of(t.n_sink + i);
            CHECK_CLOSE(&got.p4, &g.taken_p4[i], 1, 4 * SCORE_RTOL, std::pow(PROB_FLOOR, 4));
            CHECK_CLOSE(&got.p, &g.taken_p[i], 1, SCORE_RTOL, PROB_FLOOR);
        }
        CHECK_CLOSE(scores.s_use, g.score_s_use.data(), g.n_cand(), SCORE_RTOL, PROB_FLOOR);
        CHECK_CLOSE(scores.s_dev, g.score_s_dev.data(), g.n_cand(), SCORE_RTOL, 0.0);
        CHECK_CLOSE(scores.w, g.score_w.data(), g.n_cand(), SCORE_RTOL, PROB_FLOOR);
    }

    stage_store stage(t, shape, l);
    const pass_result res = run_pass(h, stage, r, params);
    for (int32_t i = 0; evicts(g) && i < g.n_stage(); ++i) {
        const token_votes got = stage.votes_of(t.n_sink + i);
        CHECK_CLOSE(&got.p, &g.taken_p[i], 1, SCORE_RTOL, EVICT_ATOL);
    }
    CHECK_EQ(res.n_merged, g.n_merged);
    CHECK_EQ(res.n_dropped, g.n_dropped);
    CHECK_EQ(h.n_sink, g.n_sink);
    CHECK_EQ(h.n_used, g.n_sink + g.n_out);
    CHECK(h.guards_hold());
    if (h.n_used != g.n_sink + g.n_out) {
        return;
    }

    const std::vector<f16> k = to_f16(g.k), v = to_f16(g.v); // before the pass
    CHECK_BITS(h.key(0), k.data(), (int64_t) g.n_sink * g.d_k);
    CHECK_BITS(h.val(0), v.data(), (int64_t) g.n_sink * g.d_v);

    const int32_t s = g.n_sink;
    std::vector<int32_t> chunk, n_tok;
    std::vector<float> s_use, bias;
    for (int32_t i = s; i < h.n_used; ++i) {
        chunk.push_back((int32_t) h.meta(i).chunk);
        n_tok.push_back((int32_t) h.meta(i).n_tok);
        s_use.push_back(h.meta(i).s_use);
        bias.push_back(h.bias_of(i));
    }
    CHECK_BITS(chunk.data(), g.out_chunk.data(), g.n_out);
    CHECK_BITS(n_tok.data(), g.out_n_tok.data(), g.n_out);
    CHECK_CLOSE(bias.data(), g.out_bias.data(), g.n_out, F16_RTOL, BIAS_ATOL);
    if (params.how == method::semantic || evicts(g)) { // the others do not read scores
        CHECK_CLOSE(s_use.data(), g.out_s_use.data(), g.n_out, evicts(g) ? SCORE_RTOL : F16_RTOL + SCORE_RTOL,
            evicts(g) ? EVICT_ATOL : F16_ATOL);
    }
    const auto out_k = to_f32(h.key(s), (size_t) g.n_out * g.d_k), out_v = to_f32(h.val(s), (size_t) g.n_out * g.d_v);
    CHECK_CLOSE(out_k.data(), g.out_k.data(), (int64_t) g.n_out * g.d_k, ROW_RTOL, ROW_ATOL);
    CHECK_CLOSE(out_v.data(), g.out_v.data(), (int64_t) g.n_out * g.d_v, ROW_RTOL, ROW_ATOL);
    for (int32_t j = 0; j < g.n_out; ++j) { // a row on its own is not touched
        if (std::count(g.member_of.begin(), g.member_of.end(), j) == 1) {
            CHECK_BITS(h.key(s + j), k.data() + (int64_t) (s + g.winner[j]) * g.d_k, g.d_k);
            CHECK_BITS(h.val(s + j), v.data() + (int64_t) (s + g.winner[j]) * g.d_v, g.d_v);
        }
    }
}

void test_cases() {
    std::istringstream index(read_file(golden_dir + "/index.txt"));
    int n = 0;
    for (std::string name; std::getline(index, name); ++n) {
        CASE(name);
        golden g;
        if (!g.read(golden_dir + "/" + name + ".bin")) {
            continue;
        }
        if ((method) g.how == method::semantic) {
            for (int32_t i = 0; i < g.n_q; ++i) {
                CHECK_EQ(look_ahead(g.seed, g.pos_q[i], g.n_horizon), g.u[i]);
            }
        }
        for (const layout & l :
            { layout{}, layout{ 3, 1, false, 17, 5 }, layout{ 2, 1, true, 9, 6 }, layout{ 1, 0, true, 0, 0 } }) {
            check_case(g, name, false, l);
            if (g.n_core == 0 && g.n_new > 0) {
                check_case(g, name, true, l);
            }
        }
    }
    CASE("");
    CHECK(n >= 34);
}

// ---- tables.txt

// A text's values are multiples of 1/64, which f16 holds exactly.
template <typename F> void check_errors(std::istream & in, F && many) {
    int32_t n_sink, n_past, n_window, n_probe, d_k, d_v, n_gqa, n_part;
    calibrate_params cp = {};
    cp.merge = true;
    cp.distinct = DISTINCT;
    in >> n_sink >> n_past >> n_window >> n_probe >> cp.n_pass >> cp.n_skip >> cp.n_horizon >> cp.seed >> d_k >> d_v >>
        n_gqa >> n_part;
    cp.n_window = n_window;
    const int32_t n = n_past + n_window + n_probe;
    auto as = [&](size_t count, auto convert) {
        std::vector<decltype(convert(0.0))> x;
        for (double y : many(count)) {
            x.push_back(convert(y));
        }
        return x;
    };
    auto half = [](double x) { return f32_to_f16((float) x); };
    const std::vector<double> parts = many(n_part);
    const auto chunk = as(n_past - n_sink, [](double x) { return (int32_t) x; });
    const auto k = as((size_t) n * d_k, half), v = as((size_t) n * d_v, half), q = as((size_t) n * n_gqa * d_k, half);
    const std::vector<double> want = many(n_part);

    std::vector<int32_t> cell(n);
    std::iota(cell.begin(), cell.end(), 0);
    cp.n_probe = n_probe;
    const head_shape shape = { d_k, d_v, n_gqa, 1.0f / std::sqrt((float) d_k), 0.0f };
    rope r;
    for (int32_t i = 0; i < d_k / 2; ++i) {
        r.inv_freq.push_back(std::ldexp(1.0f, -i));
    }
    pass_args layer = {};
    layer.shape = shape;
    layer.n_head_kv = 1;
    layer.k_stage = (const uint8_t *) k.data();
    layer.k_cell = d_k * sizeof(f16);
    layer.v_stage = (const uint8_t *) v.data();
    layer.v_cell = d_v * sizeof(f16);
    layer.v_elem = sizeof(f16);
    layer.q = (const uint8_t *) q.data();
    layer.q_row = n_gqa * d_k * sizeof(f16);
    layer.n_q_layer = 1;
    const calibrate_text text = { &layer, &r, cell.data(), cell.data(), chunk.data(), cell.data(), n, n_past, n_sink };
    const std::vector<double> got = output_errors(text, 0, cp, parts);
    CHECK_EQ(got.size(), want.size());
    CHECK_CLOSE(
        got.data(), want.data(), (int64_t) want.size(), 1e-3, 0.0); // merged rows are rounded to f16 after every pass
}

// Keys of the stage, no sinks among them, at the positions from 0 on: as pass_call has them.
template <typename F> void check_frame(std::istream & in, F && many) {
    int32_t n, d_k, n_rot, neox, n_q;
    in >> n >> d_k >> n_rot >> neox >> n_q;
    const auto inv_freq = many(n_rot / 2), k = many((size_t) n * d_k), q = many((size_t) n_q * d_k), mean = many(d_k),
               scale = many(d_k);
    auto half = [](const std::vector<double> & x) { return to_f16({ x.begin(), x.end() }); };
    tokens t;
    t.n_new = n / 2;
    t.n_window = n - t.n_new;
    t.n_q = n_q;
    t.k = half(k);
    t.v.assign((size_t) n * 32, 0);
    t.q = half(q);
    t.chunk.assign(t.n_new, 0);
    const rope r = { { inv_freq.begin(), inv_freq.end() }, neox != 0 };
    r.table(std::vector<int64_t>(n_q, 0), t.cs);
    t.token.assign(n_q, 0);
    const head_shape shape = { d_k, 32, 1, 1.0f, 0.0f };
    for (const layout & l : { layout{}, layout{ 3, 1, true, 9, 5 } }) {
        head_store h(shape, n, 0, row_type::q8_0, 0);
        stage_store stage(t, shape, l);
        run_pass(h, stage, r, {});
        const std::vector<float> got_mean = to_f32(h.parts().mean, d_k), got_scale = to_f32(h.parts().scale, d_k);
        CHECK_CLOSE(got_mean.data(), mean.data(), d_k, F16_RTOL + 1e-5, 1e-5); // turned back in float32
        CHECK_CLOSE(got_scale.data(), scale.data(), d_k, F16_RTOL + 1e-4, 0.0);
    }
}

void check_table(const std::string & line, const profile & p, std::istream & in, const std::string & what) {
    CASE(line.substr(0, 60));
    auto many = [&](size_t n) {
        std::vector<double> x(n);
        for (double & y : x) {
            in >> y;
        }
        return x;
    };
    if (what == "splitmix64") {
        // known modulo three coprime numbers whose product exceeds 2^64, the result is known
        uint64_t x, want;
        in >> x >> want;
        for (int32_t m : { 2147483647, 1000000007, 1 << 30 }) {
            CHECK_EQ(look_ahead(x, 0, m), (int32_t) (want % (uint64_t) m));
        }
    } else if (what == "horizon") {
        uint64_t seed;
        int32_t n_horizon, want;
        int64_t pos;
        in >> seed >> n_horizon >> pos >> want;
        CHECK_EQ(look_ahead(seed, pos, n_horizon), want);
    } else if (what == "delimiter") {
        int control, n, want;
        in >> control >> n;
        std::string piece;
        for (double byte : many(n)) {
            piece += (char) (int) byte;
        }
        in >> want;
        CHECK_EQ(control || is_delimiter(piece), want != 0); // control tokens are the vocabulary's affair
    } else if (what == "chunks") {
        int32_t n_chunk, first_id, n;
        in >> n_chunk >> first_id >> n;
        std::vector<bool> flags;
        for (double flag : many(n)) {
            flags.push_back(flag != 0.0);
        }
        chunker c = { n_chunk, first_id };
        std::vector<int32_t> ids;
        c.run(flags, ids);
        const std::vector<double> want = many(n);
        CHECK_CLOSE(ids.data(), want.data(), n, 0.0, 0.0);
        CHECK_EQ(c.next_id, n ? ids.back() + 1 : first_id);
    } else if (what == "budgets" || what == "equal") {
        double ratio;
        int32_t n_head = (int32_t) p.heads.size(), n_ctx, n_sink, n_chunk;
        if (what == "equal") {
            in >> n_head;
        }
        in >> ratio >> n_ctx >> n_sink >> n_chunk;
        const std::vector<double> want = many(n_head);
        const std::vector<int32_t> got = what == "equal" ? equal_budgets(n_head, ratio, n_ctx, n_sink + n_chunk)
                                                         : p.budgets(ratio, n_ctx, n_sink + n_chunk);
        CHECK_EQ(got.size(), want.size());
        CHECK_CLOSE(got.data(), want.data(), (int64_t) std::min(want.size(), got.size()), 0.0, 0.0);
    } else if (what == "errors") {
        check_errors(in, many);
    } else if (what == "frame") {
        check_frame(in, many);
    } else {
        CHECK(what == "one of the tables that make_golden.py writes");
    }
    CHECK(!in.fail());
    std::string rest;
    CHECK(!(in >> rest));
}

void test_tables() {
    profile p;
    std::string error;
    CHECK(p.read(golden_dir + "/profile.txt", error));
    CHECK_EQ(error, "");
    std::istringstream file(read_file(golden_dir + "/tables.txt"));
    int n = 0;
    for (std::string line; std::getline(file, line); ++n) {
        std::istringstream in(line);
        std::string what;
        in >> what;
        check_table(line, p, in, what);
    }
    CASE("");
    CHECK(n >= 60);
}

// What the tables cannot hold: impossible budgets, sums, the best of all ways to give rows out, means over texts.
void test_budgets() {
    CASE("budgets");
    CHECK(equal_budgets(2, 0.1, 100, 36).empty());
    CHECK_EQ(equal_budgets(9, 0.036, 1000, 36).size(), 9u);
    rng r(11);
    for (int i = 0; i < 200; ++i) {
        profile p;
        p.parts = profile_parts();
        for (int32_t h = 0, n = 1 + r.below(40); h < n; ++h) {
            const double size = std::pow(10.0, -4.0 * r.uniform()), slope = -2.0 * r.uniform();
            p.heads.push_back({ 0, h, {} });
            for (double x : p.parts) {
                p.heads.back().error.push_back(
                    r.below(20) ? size * std::pow(x, slope) * (0.8 + 0.4 * r.uniform()) : 0.0);
            }
        }
        const int32_t n_ctx = 64 + r.below(5000);
        const double ratio = 0.05 + 0.95 * r.uniform();
        const int32_t lo = std::min(36, n_ctx);
        const int64_t total = (int64_t) std::floor(ratio * n_ctx * (double) p.heads.size() + 0.5);
        const std::vector<int32_t> rows = p.budgets(ratio, n_ctx, lo);
        CHECK_EQ(rows.empty(), (int64_t) (lo * p.heads.size()) > total);
        if (!rows.empty()) {
            CHECK_EQ(std::accumulate(rows.begin(), rows.end(), (int64_t) 0), total);
            CHECK(*std::min_element(rows.begin(), rows.end()) >= lo &&
                  *std::max_element(rows.begin(), rows.end()) <= n_ctx);
        }
    }

    // convex and equal at every part but for the size: the greater error never gets fewer rows
    profile p;
    p.parts = profile_parts();
    for (int32_t h = 0; h < 5; ++h) {
        p.heads.push_back({ 0, h, {} });
        for (double x : p.parts) {
            p.heads[h].error.push_back((h + 1) * (1.0 - x) / x);
        }
    }
    const std::vector<int32_t> rows = p.budgets(0.2, 4096, 36);
    CHECK(std::is_sorted(rows.begin(), rows.end()));
    CHECK(rows.front() < rows.back());

    CASE("mean of two texts");
    const std::vector<std::pair<int32_t, int32_t>> heads = { { 1, 0 }, { 1, 1 } };
    const size_t n = profile_parts().size();
    profile mean;
    mean.add(heads, { std::vector<double>(n, 1.0), std::vector<double>(n, 2.0) });
    CHECK_EQ(mean.n_text, 1);
    CHECK_EQ(mean.heads[1].error[0], 2.0);
    mean.add(heads, { std::vector<double>(n, 3.0), std::vector<double>(n, 0.0) });
    CHECK_EQ(mean.n_text, 2);
    CHECK_EQ(mean.heads[0].error[n - 1], 2.0);
    CHECK_EQ(mean.heads[1].error[n - 1], 1.0);
    CHECK_EQ(mean.heads[1].il, 1);
    CHECK_EQ(mean.heads[1].ih, 1);
}

// ---- profile.txt

void write_file(const std::string & path, const std::string & content) {
    std::ofstream out(path, std::ios::binary);
    out << content;
    CHECK(out.good());
}

void test_profile() {
    CASE("profile");
    std::string folder = (std::filesystem::temp_directory_path() / "semcache-XXXXXX").string();
    if (!mkdtemp(folder.data())) {
        CHECK(!"no temporary folder");
        return;
    }
    const std::string path = folder + "/profile.txt", golden = read_file(golden_dir + "/profile.txt");

    profile p;
    std::string error;
    CHECK(p.read(golden_dir + "/profile.txt", error));
    CHECK_EQ(p.model_id, "golden model 135M");
    CHECK_EQ(p.n_text, 4);
    CHECK_EQ(p.parts.size(), 7u);
    CHECK_EQ(p.heads.size(), 6u);
    CHECK_EQ(p.heads[3].il, 2);
    CHECK_EQ(p.heads[3].ih, 0);
    CHECK_EQ(p.heads[3].error[4], 1.1407e-02);
    CHECK(p.write(path, error));
    CHECK_EQ(error, "");
    CHECK(read_file(path) == golden);
    CHECK(p.write(path, error)); // over an old file
    CHECK(read_file(path) == golden);
    CHECK_EQ(std::distance(std::filesystem::directory_iterator(folder), {}), 1);

    CHECK(!p.write(folder + "/none/profile.txt", error));
    CHECK(error.find(folder + "/none/profile.txt") != std::string::npos);
    error.clear();
    CHECK(!p.read(folder + "/none.txt", error));
    CHECK(error.find(folder + "/none.txt") != std::string::npos);

    // one line of the golden file replaced, or the file cut off before it
    struct {
        int line;
        const char * text;
    } const bad[] = {
        { 1, "" },
        { 1, "semcache-profile 1" },
        { 1, "semcache-profile 3\r" },
        { 1, nullptr },
        { 2, "model_id" },
        { 2, "model_id " },
        { 2, "name x" },
        { 2, nullptr },
        { 3, "n_text 0" },
        { 3, "n_text -1" },
        { 3, "n_text" },
        { 3, "n_text four" },
        { 3, "n_text 4 texts" },
        { 3, nullptr },
        { 4, "parts" },
        { 4, "parts 0.1 0.1 0.2 0.3 0.4 0.5 0.6" },
        { 4, "parts 0.2 0.1 0.3 0.4 0.5 0.6 0.7" },
        { 4, "parts 0.1 0.2 0.3 0.4 0.5 0.6 1" },
        { 4, "parts 0 0.2 0.3 0.4 0.5 0.6 0.7" },
        { 4, "parts 0.1 nan 0.3 0.4 0.5 0.6 0.7" },
        { 4, "parts 0.1 0.2 0.3 0.4 0.5 0.6 x" },
        { 4, nullptr },
        { 5, nullptr },
        { 6, "" },
        { 6, "head 0" },
        { 6, "head 0 x 1 1 1 1 1 1 1" },
        { 6, "row 0 1 1 1 1 1 1 1 1" },
        { 6, "head 0 1 1 1 1 1 1 1" },
        { 6, "head 0 1 1 1 1 1 1 1 1 1" },
        { 6, "head 0 1 1 1 1 1 1 1 inf" },
        { 6, "head 0 1 1 1 -0.1 1 1 1 1" },
        { 6, "head 0 1 1 nan 1 1 1 1 1" },
        { 6, "head 0 1 1 1 1 1 1 1 1 x" },
        { 6, "head 0 0 1 1 1 1 1 1 1" },
        { 8, "head 0 1 1 1 1 1 1 1 1" },
        { 10, "head -1 2 1 1 1 1 1 1 1" },
    };
    for (const auto & b : bad) {
        std::istringstream in(golden);
        std::string content, line;
        for (int i = 1; std::getline(in, line) && (i < b.line || b.text); ++i) {
            content += (i == b.line ? b.text : line) + "\n";
        }
        CASE("line " + text(b.line) + " \"" + (b.text ? b.text : "(end)") + "\"");
        write_file(path, content);
        profile q = p;
        error.clear();
        CHECK(!q.read(path, error));
        CHECK(error.find(path) != std::string::npos);
        CHECK(error.find("line " + text(b.line) + ":") != std::string::npos);
        CHECK(error.find("expected ") != std::string::npos && error.find("got ") != std::string::npos);
        CHECK(q.model_id == p.model_id && q.heads.size() == p.heads.size()); // left as it was
    }
    std::filesystem::remove_all(folder);
}

} // namespace

int main(int argc, char ** argv) {
    golden_dir = argc > 1 ? argv[1] : SEMCACHE_GOLDEN_DIR;
    test_cases();
    test_tables();
    test_budgets();
    test_profile();
    return finish();
}

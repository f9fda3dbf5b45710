// The pass of native/gpu, run on the CPU by a fiber per thread, against that of native/pass.

#include "gpu/run-pass.h"
#include "pass-text.h"
#include "pass/frame.h"
#include "shim-device.h"

#include <cstring>

using namespace sc_test;

static_assert(SC_FRAME_FLOOR == FRAME_FLOOR && SC_FRAME_MIN == FRAME_MIN && SC_FRAME_MAX == FRAME_MAX);

namespace {

// As pass_call::run(), by the kernels. Heads beside the one that is looked at have no rows and are left out.
pass_result run_on_device(pass_call & call, bool in_one_piece) {
    pass_args & a = call.args;
    std::vector<int32_t> rows = call.row_first;
    rows.insert(rows.end(), call.row_count.begin(), call.row_count.end());
    a.row_first = rows.data();
    a.row_count = rows.data() + a.n_head_kv;
    std::vector<pass_job> jobs;
    for (int32_t ih = 0; ih < a.n_head_kv; ++ih) {
        const bool is_it = ih == call.ih;
        jobs.push_back({ &a, ih, is_it ? call.h.n_used : 0, is_it ? call.h.n_alloc : 0 });
    }
    std::vector<pass_result> results(jobs.size());
    const pass_plan & p = call.plan;
    const int64_t n_work = device_size<int32_t>(4 * a.n_head_kv) + device_plan_size(p.n_token(), p.n_voter) +
                           device_table_size(p.n_token(), p.n_voter, a.n_rot) +
                           device_size<float>(a.shape.n_embd_head_k) + DEVICE_PARAMS_SIZE +
                           device_work_size(a, call.h.n_alloc, p.n_token(), p.n_sink + p.n_new, p.n_voter);
    std::vector<uint64_t> work((n_work + sizeof(uint64_t) - 1) / sizeof(uint64_t), ~0ull);
    const pass_task task = { &p, jobs.data(), a.n_head_kv, nullptr, results.data(), (uint8_t *) work.data(), n_work,
        nullptr };
    const pass_layout layout(task);
    const std::vector<uint8_t> upload = layout.upload();
    CHECK(layout.least_work() <= n_work);
    memcpy(work.data(), upload.data(), upload.size());
    shim_device dev(call.ih, in_one_piece);
    device_pass<shim_device>(dev, task).run();
    std::vector<uint8_t> counts(layout.counts_size());
    memcpy(counts.data(), work.data(), counts.size());
    (void) layout.read_counts(counts, task); // heads that are left out have none
    call.row_count[call.ih] = a.row_count[call.ih];
    call.h.n_sink += call.plan.n_sink;
    call.h.n_used = call.row_count[call.ih];
    std::copy_n(call.heads.begin() + call.ih * call.h.heads.size(), call.h.heads.size(), call.h.heads.begin());
    return results[call.ih];
}

void check_near(const std::vector<float> & got, const std::vector<float> & want, double tol, const char * what) {
    double worst = 0.0;
    CHECK_EQ(got.size(), want.size());
    for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
        if (std::isnan(got[i]) && std::isnan(want[i])) {
            continue; // nobody has written it
        }
        const double err = std::fabs(got[i] - want[i]) / (tol * (1.0 + std::fabs(want[i])));
        worst = std::isnan(err) ? INFINITY : std::max(worst, err);
    }
    if (worst > 1.0) {
        report(false, __FILE__, __LINE__, std::string(what) + ": " + text(worst) + " times the tolerance");
    }
}

struct device_spec {
    spec s;
    row_type type = row_type::f16;
    bool rotated = false, q8_ring = false;
    bool weighted = false; // queries have weights behind RoPE, and one channel none
    bool twins = false;    // tokens that are alike, so that scores are equal
    int n_pass = 3;
};

// Some passes, each from where the CPU's left off.
void check(const device_spec & d, uint64_t seed) {
    const spec & s = d.s;
    text_source text(s, seed);
    head_store h(text.shape, s.n_alloc, 0, d.type);
    for (int pass = 0; pass < d.n_pass; ++pass) {
        CASE("seed " + std::to_string(seed) + ", type " + std::to_string((int) d.type) + ", pass " +
             std::to_string(pass));
        tokens t = text.draw(pass == 0, s.n_new);
        t.n_full = pass;
        for (int32_t i = 0; d.twins && i + 1 < t.n_new; i += 2) {
            if (t.chunk[i] == t.chunk[i + 1]) {
                std::copy_n(&t.k[(size_t) (t.n_sink + i) * s.d_k], s.d_k, &t.k[(size_t) (t.n_sink + i + 1) * s.d_k]);
                std::copy_n(&t.v[(size_t) (t.n_sink + i) * s.d_v], s.d_v, &t.v[(size_t) (t.n_sink + i + 1) * s.d_v]);
            }
        }
        text.accept(t);
        head_store other = h;
        stage_store stage(t, text.shape, { 2, pass % 2, pass % 3 == 1, 10, (uint64_t) pass });
        if (d.q8_ring) {
            stage.q8.resize(stage.q.size() / Q_BLOCK);
            const std::vector<float> q = to_f32(stage.q.data(), stage.q.size());
            f32_to_q8_0_row(q.data(), stage.q8.data(), (int32_t) q.size());
        }
        stage_store again = stage;
        pass_call want(h, stage, text.rp, text.params()), got(other, again, text.rp, text.params());
        want.args.k_rotated = got.args.k_rotated = d.rotated;
        std::vector<float> weight(s.d_k);
        for (int32_t e = 0; e < s.d_k; ++e) {
            weight[e] = e == 3 ? 0.0f : (float) (1.0 + 0.5 * text.r.uniform());
        }
        want.args.q_weight = got.args.q_weight = d.weighted ? weight.data() : nullptr;
        const pass_result counts = want.run(), device_counts = run_on_device(got, pass == 2);

        CHECK_EQ(device_counts.n_merged, counts.n_merged);
        CHECK_EQ(device_counts.n_dropped, counts.n_dropped);
        CHECK_EQ(other.n_used, h.n_used);
        CHECK_EQ(other.n_sink, h.n_sink);
        CHECK(other.guards_hold());
        const int32_t n = std::min(h.n_used, other.n_used);
        const bool exact = d.type == row_type::f16;
        check_near(to_f32(other.heads.data(), other.heads.size()), to_f32(h.heads.data(), h.heads.size()),
            exact ? 1e-6 : 2e-3, "frame and sinks");
        for (int32_t i = h.n_sink; i < n; ++i) {
            CHECK_EQ(other.origin[i], h.origin[i]);
            check_near({ other.bias_of(i) }, { h.bias_of(i) }, 2e-3, "bias");
            check_near({ other.meta(i).s_use }, { h.meta(i).s_use }, 1e-3, "s_use");
            check_near(other.key_f32(i), h.key_f32(i), exact ? 2e-3 : 0.05, "key");
            check_near(other.val_f32(i), h.val_f32(i), exact ? 5e-3 : 0.1, "value");
        }
        for (int32_t i = 0; i < t.n(); ++i) {
            const token_votes a = again.votes_of(i), b = stage.votes_of(i);
            check_near({ a.p4 / b.p4, a.p / b.p }, { 1.0f, 1.0f }, 1e-4, "votes");
        }
    }
}

// A pass before there are more tokens than the window: votes are taken, and there are no candidates; and one that
// nobody votes in.
void check_votes_only() {
    for (bool voters : { true, false }) {
        CASE(voters ? "votes only" : "no voters");
        const spec s;
        text_source text(s, 5);
        head_store h(text.shape, s.n_alloc);
        tokens t = text.draw(!voters, voters ? 0 : s.n_new);
        t.n_q = voters ? t.n_q : 0;
        head_store other = h;
        stage_store stage(t, text.shape, {}), again = stage;
        pass_call want(h, stage, text.rp, text.params()), got(other, again, text.rp, text.params());
        want.run();
        run_on_device(got, false);
        CHECK_EQ(other.n_used, h.n_used);
        CHECK_BITS(other.origin.data() + h.n_sink, h.origin.data() + h.n_sink, h.n_used - h.n_sink);
        for (int32_t i = 0; i < t.n(); ++i) {
            check_near({ again.votes_of(i).p }, { stage.votes_of(i).p }, 1e-4, "votes");
        }
    }
}

std::vector<device_spec> all_specs() {
#if defined(SC_ONE_CASE) // for planted faults: quick to run
    device_spec one;
    one.s.d_k = one.s.d_v = one.s.n_rot = 32;
    one.s.n_gqa = 1;
    one.s.n_new = 24;
    one.s.n_window = 5;
    one.s.n_alloc = 20;
    one.n_pass = 2;
    one.type = row_type::iq4_nl;
    one.rotated = one.twins = true;
    return { one };
#else
    std::vector<device_spec> specs(10);
    specs[1].s.merge = false;
    specs[2].s.d_k = specs[2].s.d_v = 80;
    specs[2].s.n_gqa = 1;
    specs[2].s.n_rot = 32;
    specs[2].s.softcap = 20.0f;
    specs[3].s.d_k = specs[3].s.d_v = 32;
    specs[3].s.n_gqa = 10;
    specs[3].s.n_rot = 32;
    specs[3].s.neox = false;
    specs[3].s.n_alloc = 20;
    specs[4].s.n_rot = 0;
    specs[4].s.n_alloc = 150;
    specs[4].s.n_new = 160;
    specs[5].s.voted = true;
    specs[5].s.n_sink = 0;
    specs[5].s.distinct = 0;
    specs[6].s.d_v = 64;
    specs[6].type = row_type::iq4_nl;
    specs[7] = specs[6];
    specs[7].type = row_type::q5_0;
    specs[7].rotated = true;
    specs[7].q8_ring = true;
    specs[8] = specs[6];
    specs[8].type = row_type::q4_0;
    specs[8].s.n_alloc = 200; // room for all
    specs[9] = specs[6];
    specs[9].type = row_type::q8_0;
    specs[9].s.distinct = 100;
    specs.resize(12);
    specs[10].twins = specs[10].weighted = true;
    specs[11] = specs[7];
    specs[11].twins = true;
    return specs;
#endif
}

} // namespace

int main() {
    uint64_t seed = 70;
    for (const device_spec & d : all_specs()) {
        check(d, seed++);
    }
    check_votes_only();
    return sc_test::finish();
}

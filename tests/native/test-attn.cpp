// Proportional attention against a slow one in float64.

#include "attn-case.h"

#include <thread>

using namespace sc_test;

namespace {

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
    check_output(x, got);
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

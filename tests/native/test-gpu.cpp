// The kernels of native/gpu, run on the CPU by a fiber per thread, against attention in float64.

#include "attn-case.h"
#include "gpu/attn-dims.h"
#include "gpu/prop-attn-many.h"

using namespace sc_test;

static_assert((int) row_type::f16 == SC_F16 && (int) row_type::q8_0 == SC_Q8_0 && (int) row_type::q5_0 == SC_Q5_0 &&
              (int) row_type::q4_0 == SC_Q4_0 && (int) row_type::iq4_nl == SC_IQ4_NL);

namespace {

// NQ: query rows of a block; MANY: on matrix units.
constexpr int MANY = SC_MANY_ROWS;

template <int D, int NQ> std::vector<float> run(const tensors & x, int n_part) {
    const attn_args & a = x.a;
    const prop_attn_args g = device_attn_args(a, n_part);
    std::vector<int32_t> rows = x.row_first;
    rows.insert(rows.end(), x.row_count.begin(), x.row_count.end());
    const prop_attn_src src = { a.q, a.k, a.v, (const uchar *) a.mask, a.k_core, a.v_core, a.bias, a.heads, rows.data(),
        a.sinks };
    std::vector<float> work((size_t) n_part * a.n_tokens * a.n_head * (D + 2), NAN), out(x.n_out(), NAN);
    const int n_row = a.n_head / a.n_head_kv * a.n_tokens;
    constexpr int shared = NQ == MANY ? (int) prop_attn_many_shared<D>::SIZE : (int) prop_attn_shared<D, NQ>::SIZE;
    sc_cpu::launch(n_part, (n_row + NQ - 1) / NQ, SC_THREADS, shared, [&](const sc_tid & t, uchar * sh) {
        if constexpr (NQ == MANY) {
            prop_attn_many_part<D>(t, g, src, work.data(), sh);
        } else {
            prop_attn_part<D, NQ>(t, g, src, work.data(), sh);
        }
    });
    sc_cpu::launch(a.n_head * a.n_tokens, 1, SC_THREADS, 0,
        [&](const sc_tid & t, uchar *) { prop_attn_reduce<D>(t, g, rows.data(), a.sinks, work.data(), out.data()); });
    return out;
}

template <int D, int NQ> void check(spec s, int n_part) {
    s.d_k = s.d_v = D;
    s.f16_tile = true;
    s.f16_units = NQ == MANY;
    CASE("d " + std::to_string(D) + ", " + std::to_string(NQ) + " queries a block, gqa " + std::to_string(s.n_gqa) +
         ", tokens " + std::to_string(s.n_tokens) + ", types " + std::to_string((int) s.k_type) + " " +
         std::to_string((int) s.v_type) + ", seed " + std::to_string(s.seed));
    tensors x(s);
    check_output(x, run<D, NQ>(x, n_part));
}

spec small() {
    spec s;
    s.n_gqa = 3;
    s.n_tokens = 2;
    s.cores = { 70, 0, 150 };
    s.n_kv = 90;
    return s;
}

#if defined(SC_ONE_CASE) // for planted errors: quick to compile

void test_all() {
    spec s = small();
    s.k_type = s.v_type = row_type::q5_0;
    s.cell_type = row_type::q8_0;
    s.n_tokens = 3;
    check<128, 4>(s, 4);
    check<64, MANY>(s, 4);
}

#else

void test_types() {
    for (row_type k_type : ALL_TYPES) {
        for (row_type v_type : ALL_TYPES) {
            spec s = small();
            s.k_type = k_type;
            s.v_type = v_type;
            s.seed = 1 + (int) k_type * 5 + (int) v_type;
            s.rotated = s.seed % 2;
            s.cell_type = s.seed % 3 ? row_type::q8_0 : row_type::f16;
            check<64, 4>(s, 5);
            check<64, MANY>(s, 5);
        }
    }
}

void test_properties() {
    spec s = small();
    s.k_type = s.v_type = row_type::iq4_nl;
    s.cell_type = row_type::q8_0;
    s.rotated = true;
    check<64, 8>(s, 1);
    check<64, 8>(s, 40); // more parts than a head has tiles
    auto with = [&](auto && change) {
        spec t = s;
        change(t);
        t.seed = ++s.seed;
        check<64, 4>(t, 6);
        check<64, MANY>(t, 6);
    };
    with([](spec & t) { t.softcap = 5.0f; });
    with([](spec & t) { t.sinks = true; });
    with([](spec & t) { t.mask = MASK_F32; });
    with([](spec & t) { t.q_heads = true; });
    with([](spec & t) { t.n_sink = 0; });
    with([](spec & t) { t.biased = t.outliers = true; });
    with([](spec & t) { t.rotated = false; });
    with([](spec & t) { t.k_type = t.v_type = row_type::f16; });
    with([](spec & t) { t.cores = { 3, 1, 2 }; }); // fewer rows than sinks
    with([](spec & t) { t.cores = { 0, 0, 0 }; }); // no pass has been yet
    with([](spec & t) { t.cores = { 40, 3 }, t.n_kv = 0; });
    with([](spec & t) { t.sinks = true, t.blind = 1; });
    with([](spec & t) { t.n_gqa = 1, t.n_tokens = 1; });
    with([](spec & t) { t.n_gqa = 16, t.n_tokens = 1; });
    with([](spec & t) { t.n_gqa = 7, t.n_tokens = 11, t.n_kv = 40; });
}

void test_head_sizes() {
    spec s = small();
    check<80, 4>(s, 3); // rows of f16, no whole number of blocks
    check<80, MANY>(s, 3);
    s.k_type = s.v_type = row_type::iq4_nl;
    s.rotated = true;
    check<96, 4>(s, 3);
    s.cell_type = row_type::q8_0;
    check<128, 8>(s, 3);
    check<192, 4>(s, 3);
    check<256, 4>(s, 3);
    s.n_tokens = 30; // rows for two blocks, the second of which is not full
    check<64, MANY>(s, 3);
    check<96, MANY>(s, 2);
    check<128, MANY>(s, 3);
    check<256, MANY>(s, 2);
    s.n_gqa = s.n_tokens = 1;
    check<64, 1>(s, 3);
    check<128, 1>(s, 3);
}

void test_all() {
    test_types();
    test_properties();
    test_head_sizes();
}

#endif

} // namespace

int main() {
    test_all();
    printf("largest error: %.3f of the tolerance\n", worst_error);
    return sc_test::finish();
}

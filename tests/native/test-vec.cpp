// The vector operations of sc-vec.h against libm and slow code.

#include "sc-test.h"
#include "sc-vec.h"

#include <algorithm>
#include <limits>

using namespace semcache;
using sc_test::rng;

namespace {

float bits_to_f32(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

float exp1(float x) { return vexp(vset(x))[VL - 1]; }
float log1(float x) { return vlog(vset(x))[0]; }

// Largest error of f over [lo, hi] in relative and in absolute terms; VL different numbers at a time.
template <typename F, typename R>
void worst_of(F f, R ref, double lo, double hi, bool by_bits, double & rel, double & abs) {
    rng r(3);
    rel = abs = 0.0;
    for (int i = 0; i < 200000 / VL; ++i) {
        float x[VL], y[VL];
        for (float & e : x) {
            e = (float) (lo + (hi - lo) * r.uniform());
            if (by_bits) { // every exponent alike
                e = (float) std::exp2(std::log2(lo) + (std::log2(hi) - std::log2(lo)) * r.uniform());
            }
            e = std::min(std::max(e, (float) lo), (float) hi);
        }
        vstore(y, f(vload(x)));
        for (int j = 0; j < VL; ++j) {
            const double want = ref((double) x[j]), err = std::fabs(y[j] - want);
            abs = std::max(abs, err);
            rel = want != 0.0 ? std::max(rel, err / std::fabs(want)) : rel;
        }
    }
}

void test_exp_log() {
    double rel, abs;
    auto exp_ref = [](double x) { return std::exp(x); };
    auto log_ref = [](double x) { return std::log(x); };

    CASE("vexp");
    worst_of(vexp, exp_ref, -87.0, 88.0, false, rel, abs);
    printf("vexp on [-87, 88]: relative error %.2g\n", rel);
    CHECK(rel < 3e-7);
    worst_of(vexp, exp_ref, -1.0, 1.0, false, rel, abs);
    printf("vexp on [-1, 1]: relative error %.2g\n", rel);
    CHECK(rel < 3e-7);
    CHECK_EQ(exp1(0.0f), 1.0f);
    CHECK_EQ(exp1(-0.0f), 1.0f);
    CHECK(exp1(-87.0f) > 0.0f);
    for (float x : { -87.001f, -88.0f, -104.0f, -1e4f, -1e30f, -INFINITY }) {
        CHECK_EQ(exp1(x), 0.0f);
    }
    for (float x : { 88.0f, 89.0f, 1e4f, 1e30f, INFINITY }) { // large and finite, so that a sum over lanes is no NaN
        CHECK(std::fabs(exp1(x) / std::exp(88.0) - 1.0) < 3e-7);
    }
    float x[VL], y[VL];
    for (int i = 0; i < VL; ++i) { // lanes are independent
        x[i] = i % 3 == 0 ? -1e30f : i % 3 == 1 ? 500.0f : 0.25f * (float) i;
    }
    vstore(y, vexp(vload(x)));
    for (int i = 0; i < VL; ++i) {
        CHECK_EQ(y[i], exp1(x[i]));
    }

    CASE("vlog");
    const double min = std::numeric_limits<float>::min(), max = std::numeric_limits<float>::max();
    worst_of(vlog, log_ref, min, max, true, rel, abs);
    printf("vlog on all normal numbers: absolute error %.2g\n", abs);
    CHECK(abs < 1e-5); // two roundings of numbers up to 88, of 3.8e-6 each
    worst_of(vlog, log_ref, 0.5, 2.0, false, rel, abs);
    printf("vlog on [0.5, 2]: absolute error %.2g, relative %.2g\n", abs, rel);
    CHECK(abs < 2e-7);
    worst_of(vlog, log_ref, 0.71, 1.41, false, rel, abs);
    printf("vlog on [0.71, 1.41]: relative error %.2g\n", rel);
    CHECK(rel < 4e-7);
    CHECK_EQ(log1(1.0f), 0.0f);
    for (int n = 1; n <= 255; ++n) { // the biases of n equal tokens
        CHECK(std::fabs(log1((float) n) - std::log((double) n)) < 1e-6);
    }
    CHECK(std::fabs(log1(1e-20f) - std::log(1e-20)) < 5e-6);
}

// ---- f16

double slow_f16_to_f64(f16 h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    if (e == 31) {
        return m ? NAN : sign * INFINITY;
    }
    return sign * (e ? std::ldexp(1024.0 + m, e - 25) : std::ldexp((double) m, -24));
}

// Round to nearest even, by the values of the neighbours alone.
f16 slow_f64_to_f16(double x) {
    const f16 sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x >= 65520.0) { // halfway between the greatest number and the next one, were there one
        return sign | 0x7c00;
    }
    uint32_t lo = 0, hi = 0x7bff; // the greatest h with value <= x
    while (lo < hi) {
        const uint32_t mid = (lo + hi + 1) / 2;
        if (slow_f16_to_f64((f16) mid) <= x) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    const double a = slow_f16_to_f64((f16) lo), b = lo == 0x7bff ? 65536.0 : slow_f16_to_f64((f16) (lo + 1));
    const bool up = x - a > b - x || (x - a == b - x && (lo & 1));
    return (f16) (sign | (lo + up));
}

bool is_nan(f16 h) { return (h & 0x7fff) > 0x7c00; }

void check_f32_to_f16(float x) {
    const f16 got = f32_to_f16(x);
    if (std::isnan(x)) {
        CHECK(is_nan(got));
        CHECK_EQ(got >> 15, (int) std::signbit(x));
    } else if (got != slow_f64_to_f16(x)) {
        CASE("f32_to_f16 of " + sc_test::text(x));
        CHECK_EQ(got, slow_f64_to_f16(x));
    }
}

void test_f16() {
    CASE("f16");
    std::vector<f16> all(65536);
    for (uint32_t h = 0; h < 65536; ++h) {
        all[h] = (f16) h;
        const float f = f16_to_f32((f16) h);
        if (is_nan((f16) h)) {
            CHECK(std::isnan(f));
            CHECK_EQ(std::signbit(f), h >> 15 == 1);
            check_f32_to_f16(f);
        } else {
            const float want = (float) slow_f16_to_f64((f16) h);
            CHECK_BITS(&f, &want, 1);
            CHECK_EQ(f32_to_f16(f), h);
        }
    }

    for (uint32_t h = 0; h < 0x7c00; ++h) { // halfway to the next number, and next to that
        const double a = slow_f16_to_f64((f16) h), b = h == 0x7bff ? 65536.0 : slow_f16_to_f64((f16) (h + 1));
        const float mid = (float) (0.5 * (a + b));
        for (float x : { mid, std::nextafter(mid, 0.0f), std::nextafter(mid, INFINITY) }) {
            check_f32_to_f16(x);
            check_f32_to_f16(-x);
        }
    }
    rng r(1);
    for (int i = 0; i < 300000; ++i) {
        check_f32_to_f16(bits_to_f32((uint32_t) r.next()));                          // anything
        check_f32_to_f16((float) (r.normal() * std::exp2(32.0 * r.uniform() - 26))); // in and around the range of f16
    }
    CASE("f16 limits");
    for (float x : { 0.0f, 0x1p-24f, 0x1p-25f, 0x1.000002p-25f, 0x1p-26f, 0x1p-149f, 0x1.ffcp-15f, 0x1p-14f, 65504.0f,
             65519.0f, 65519.99f, 65520.0f, 65536.0f, 1e30f, INFINITY, NAN }) {
        check_f32_to_f16(x);
        check_f32_to_f16(-x);
    }

    CASE("f16 rows");
    std::vector<float> f(65536 + 1);
    f16_to_f32_row(all.data(), f.data(), 65536);
    for (uint32_t h = 0; h < 65536; ++h) {
        const float one = f16_to_f32((f16) h);
        CHECK(std::isnan(one) ? std::isnan(f[h]) : memcmp(&one, &f[h], sizeof(one)) == 0);
    }
    for (int n = 0; n <= 3 * VL + 1; ++n) { // every length, at odd addresses, and not one element further
        std::vector<float> x(n + 2, 7.0f), y(n + 2, 7.0f);
        std::vector<f16> h(n + 2, 77);
        for (int i = 0; i < n; ++i) {
            x[1 + i] = (float) (r.normal() * std::exp2(8.0 * r.normal()));
        }
        f32_to_f16_row(x.data() + 1, h.data() + 1, n);
        f16_to_f32_row(h.data() + 1, y.data() + 1, n);
        for (int i = 0; i < n; ++i) {
            CHECK_EQ(h[1 + i], f32_to_f16(x[1 + i]));
            CHECK_EQ(y[1 + i], f16_to_f32(h[1 + i]));
        }
        CHECK(h.front() == 77 && h.back() == 77 && y.front() == 7.0f && y.back() == 7.0f);
    }
}

// ---- products; small integers, whose sums are exact in any order

std::vector<float> integers(rng & r, size_t n) {
    std::vector<float> x(n);
    for (float & e : x) {
        e = (float) (r.below(33) - 16);
    }
    return x;
}

void test_reductions() {
    rng r(2);
    CASE("reductions");
    for (int i = 0; i < 100; ++i) {
        const std::vector<float> x = integers(r, VL);
        float sum = 0.0f;
        for (float e : x) {
            sum += e;
        }
        CHECK_EQ(vsum(vload(x.data())), sum);
        CHECK_EQ(vmax_lanes(vload(x.data())), *std::max_element(x.begin(), x.end()));
    }
    for (int n = 0; n <= 5 * VL + 3; ++n) {
        const std::vector<float> a = integers(r, n + 1), b = integers(r, n + 1);
        std::vector<float> y = integers(r, n + 1), want = y;
        float sum = 0.0f;
        for (int i = 0; i < n; ++i) {
            sum += a[i] * b[i];
            want[i] += 3.0f * a[i];
        }
        CHECK_EQ(dot(a.data(), b.data(), n), sum);
        axpy(3.0f, a.data(), y.data(), n);
        CHECK_BITS(y.data(), want.data(), n + 1);
    }
    for (int64_t n : { 0, 1, 15, 16, 17 }) {
        CHECK_EQ(pad_to(n, 16), n == 0 ? 0 : n == 17 ? 32 : 16);
    }
}

void check_gemm(rng & r, int n_m, int n, int n_k, int lda_more, int ldx_more) {
    CASE("gemm " + std::to_string(n_m) + "x" + std::to_string(n) + "x" + std::to_string(n_k));
    const int n_n = (int) pad_to(n, NR);
    const int64_t lda = n_k + lda_more, ldx = n_k + ldx_more, ldc = n_n + 3;
    const std::vector<float> a = integers(r, n_m * lda), x = integers(r, n * ldx);
    std::vector<float> panels((size_t) n_n * n_k + 1, 7.0f), c(n_m * ldc, 7.0f), want = c;
    pack_panels(x.data(), ldx, n, n_k, panels.data());
    CHECK_EQ(panels.back(), 7.0f);
    gemm_panels(a.data(), lda, n_m, panels.data(), n_k, n_n, c.data(), ldc);
    for (int m = 0; m < n_m; ++m) {
        for (int j = 0; j < n_n; ++j) {
            float sum = 0.0f;
            for (int k = 0; k < n_k && j < n; ++k) {
                sum += a[m * lda + k] * x[j * ldx + k];
            }
            want[m * ldc + j] = sum; // 0 in the columns that fill the panel
        }
    }
    CHECK_CLOSE(c.data(), want.data(), (int64_t) c.size(), 0.0, 0.0);
}

void test_gemm() {
    rng r(4);
    for (int n_m = 1; n_m <= 2 * MR + 5; ++n_m) {
        for (int n : { 1, NR - 1, NR, NR + 1, 3 * NR + 5 }) {
            check_gemm(r, n_m, n, 1 + r.below(9), r.below(3), r.below(3));
        }
    }
    for (int n_k : { 1, 3, 48, 64, 80, 96, 128, 256 }) {
        check_gemm(r, MR + 4, NR + 3, n_k, 0, 0);
    }

    for (int n_m : { 1, 2, MR, MR + 5, 2 * MR + 3 }) {
        CASE("gemm_cols " + std::to_string(n_m));
        const int n_k = 11, n_n = 2 * NR, lda = 2 * MR + 4, ldb = n_n + 1, ldc = n_n + 2;
        const std::vector<float> a = integers(r, n_k * lda), b = integers(r, n_k * ldb);
        std::vector<float> c((size_t) n_m * ldc, 7.0f), want = c;
        gemm_cols(a.data(), lda, n_m, b.data(), ldb, n_k, n_n, c.data(), ldc);
        for (int m = 0; m < n_m; ++m) {
            for (int j = 0; j < n_n; ++j) {
                want[m * ldc + j] = 0.0f;
                for (int k = 0; k < n_k; ++k) {
                    want[m * ldc + j] += a[k * lda + m] * b[k * ldb + j];
                }
            }
        }
        CHECK_CLOSE(c.data(), want.data(), (int64_t) c.size(), 0.0, 0.0);
    }

    CASE("gemm_tile");
    const int n_k = 37, ldb = NR + 5, lda = 40, ldc = NR + 2; // rows, not panels; added to what is there
    const std::vector<float> a = integers(r, 3 * lda), b = integers(r, n_k * ldb);
    std::vector<float> c = integers(r, 3 * ldc), want = c;
    gemm_tile<3>(a.data(), lda, 1, b.data(), ldb, n_k, c.data(), ldc, true);
    for (int m = 0; m < 3; ++m) {
        for (int j = 0; j < NR; ++j) {
            for (int k = 0; k < n_k; ++k) {
                want[m * ldc + j] += a[m * lda + k] * b[k * ldb + j];
            }
        }
    }
    CHECK_CLOSE(c.data(), want.data(), (int64_t) c.size(), 0.0, 0.0);
}

} // namespace

int main() {
    printf("%d floats in a vector\n", VL);
    test_exp_log();
    test_f16();
    test_reductions();
    test_gemm();
    return sc_test::finish();
}

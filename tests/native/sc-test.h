// sc-test.h - checks for tests/native: every failure is printed with file, line and values, none ends the program

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace sc_test {

struct counts {
    int passed = 0, failed = 0;
    std::string where; // printed with failures, see CASE
};

inline counts & state() {
    static counts c;
    return c;
}

inline void report(bool ok, const char * file, int line, const std::string & message) {
    counts & c = state();
    ++(ok ? c.passed : c.failed);
    if (!ok && c.failed <= 40) {
        printf("%s:%d: %s%s%s\n", file, line, c.where.c_str(), c.where.empty() ? "" : ": ", message.c_str());
    }
}

template <typename T> std::string text(const T & x) {
    std::ostringstream s;
    s.precision(9);
    s << x;
    return s.str();
}

template <typename A, typename B>
void check_eq(const A & got, const B & want, const char * expr, const char * file, int line) {
    const bool ok = got == want;
    report(ok, file, line, ok ? "" : std::string(expr) + ": expected " + text(want) + ", got " + text(got));
}

// The error of got[i], as a part of tol(want[i]) = rtol*|want[i]| + atol, at its worst i. NaN equals nothing.
template <typename A, typename B>
double check_close(const A * got, const B * want, int64_t n, double rtol, double atol, const char * expr,
    const char * file, int line) {
    double worst = 0.0;
    int64_t at = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double tol = rtol * std::fabs((double) want[i]) + atol;
        double e = (double) got[i] == (double) want[i] ? 0.0 : std::fabs((double) got[i] - (double) want[i]) / tol;
        e = std::isnan(e) ? INFINITY : e;
        if (e > worst) {
            worst = e;
            at = i;
        }
    }
    const bool ok = worst <= 1.0;
    report(ok, file, line,
        ok ? ""
           : std::string(expr) + "[" + text(at) + "]: expected " + text((double) want[at]) + ", got " +
                 text((double) got[at]) + ", " + text(worst) + " times the tolerance");
    return worst;
}

// Elements are compared as bytes: NaN equals itself, 0 does not equal -0.
template <typename T>
void check_bits(const T * got, const T * want, int64_t n, const char * expr, const char * file, int line) {
    int64_t i = 0;
    while (i < n && memcmp(got + i, want + i, sizeof(T)) == 0) {
        ++i;
    }
    report(i == n, file, line, i == n ? "" : std::string(expr) + "[" + text(i) + "]: other bits than expected");
}

inline int finish() {
    printf("%d passed, %d failed\n", state().passed, state().failed);
    return state().failed != 0;
}

// The same numbers on every platform.
struct rng {
    uint64_t s;

    explicit rng(uint64_t seed) : s(seed) {}

    uint64_t next() { // splitmix64
        uint64_t z = s += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    int below(int n) { return (int) (next() % (uint64_t) n); }
    double uniform() { return (double) (next() >> 11) * 0x1p-53; }
    double normal() {
        const double r = std::sqrt(-2.0 * std::log(1.0 - uniform()));
        return r * std::cos(6.283185307179586 * uniform());
    }
};

} // namespace sc_test

#define CHECK(cond) sc_test::report((cond), __FILE__, __LINE__, "expected " #cond)
#define CHECK_EQ(got, want) sc_test::check_eq((got), (want), #got, __FILE__, __LINE__)
#define CHECK_CLOSE(got, want, n, rtol, atol) \
    sc_test::check_close((got), (want), (n), (rtol), (atol), #got, __FILE__, __LINE__)
#define CHECK_BITS(got, want, n) sc_test::check_bits((got), (want), (n), #got, __FILE__, __LINE__)
#define CASE(name) (sc_test::state().where = (name))

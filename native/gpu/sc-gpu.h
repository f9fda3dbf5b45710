// sc-gpu.h - one kernel source for CUDA, Metal and, for tests, the CPU: the few functions in which they differ
//
//     sc_tid                                    who runs: id in the block, lane in the warp of SC_WARP, warp; x, y: the
//                                               block
//     sc_sync(t)                                barrier of the block
//     sc_xor(t, x, mask)                        x of the lane whose number differs by mask
//
// Metal's fast math takes no infinities: what is masked is finite (SC_MASKED).

#pragma once

#include "sc-gpu-words.h"

#if defined(__METAL_VERSION__)
struct sc_tid {
    uint id, lane, warp, x, y;
};
static inline void sc_sync(SC_THREAD const sc_tid &) {
    threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); // blocks hand work on in both
}
static inline float sc_xor(SC_THREAD const sc_tid &, float x, ushort mask) { return simd_shuffle_xor(x, mask); }
static inline float sc_h2f(half x) { return float(x); }
static inline half sc_f2h(float x) { return half(x); }
static inline half sc_bits2h(ushort x) { return as_type<half>(x); }
static inline float sc_exp(float x) { return exp(x); }
static inline float sc_tanh(float x) { return precise::tanh(x); }
static inline float sc_max(float a, float b) { return max(a, b); }
static inline float sc_rsqrt(float x) { return rsqrt(x); }
static inline float sc_sqrt(float x) { return sqrt(x); }
static inline float sc_log(float x) { return log(x); }
static inline float sc_round(float x) { return round(x); }
static inline ushort sc_h2bits(half x) { return as_type<ushort>(x); }
static inline uint sc_float_bits(float x) { return as_type<uint>(x); }

#elif defined(__CUDACC__)
struct sc_tid {
    uint id, lane, warp, x, y;
};
SC_DEVICE void sc_sync(const sc_tid &) { __syncthreads(); }
SC_DEVICE float sc_xor(const sc_tid &, float x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask, 32); }
SC_DEVICE float sc_h2f(__half x) { return __half2float(x); }
SC_DEVICE __half sc_f2h(float x) { return __float2half(x); }
SC_DEVICE __half sc_bits2h(ushort x) { return __ushort_as_half(x); }
SC_DEVICE float sc_exp(float x) { return __expf(x); }
SC_DEVICE float sc_tanh(float x) { return tanhf(x); }
SC_DEVICE float sc_max(float a, float b) { return fmaxf(a, b); }
SC_DEVICE float sc_rsqrt(float x) { return rsqrtf(x); }
SC_DEVICE float sc_sqrt(float x) { return sqrtf(x); }
SC_DEVICE float sc_log(float x) { return __logf(x); }
SC_DEVICE float sc_round(float x) { return roundf(x); }
SC_DEVICE ushort sc_h2bits(__half x) { return __half_as_ushort(x); }
SC_DEVICE uint sc_float_bits(float x) { return __float_as_uint(x); }

#else
    #include "sc-gpu-cpu.h"
#endif

SC_DEVICE float sc_warp_sum(SC_THREAD const sc_tid & t, float x) {
    for (int m = SC_WARP / 2; m > 0; m /= 2) {
        x += sc_xor(t, x, (ushort) m);
    }
    return x;
}

// A logit under a softcap; 0: none.
SC_DEVICE float sc_capped(float x, float cap) { return cap > 0.0f ? cap * sc_tanh(x / cap) : x; }

// Compilers that take all numbers for finite do not see through bits.
SC_DEVICE bool sc_is_nan(float x) { return (sc_float_bits(x) & 0x7fffffffu) > 0x7f800000u; }

#define SC_HUGE 3e38f
#define SC_MASKED (-1e30f)
#define SC_MASKED_LO (-1e29f) // what is below is masked

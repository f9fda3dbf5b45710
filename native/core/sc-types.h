// sc-types.h - what the interfaces of native/core and native/cpu share

#pragma once

#include <cstdint>

namespace semcache {

enum class method { semantic = 0, paper = 1, streaming = 2, keydiff = 3, knorm = 4, snapkv = 5, tova = 6, h2o = 7 };

constexpr bool evicts(method m) { return m >= method::keydiff; } // by a policy of evict/

constexpr bool asks_queries(method m) {
    return m == method::semantic || m == method::snapkv || m == method::tova || m == method::h2o;
}

typedef uint16_t f16; // IEEE 754 binary16, as in ggml_fp16_t

constexpr int32_t Q_BLOCK = 32; // values that share a scale

// As ggml's block_q8_0: d*qs.
struct q8_block {
    f16 d;
    int8_t qs[Q_BLOCK];
};
static_assert(sizeof(q8_block) == 34, "no padding");

// As ggml's block_q4_0: d*(code - 8); value i in the low half of qs[i], value i + 16 in the high half.
struct q4_block {
    f16 d;
    uint8_t qs[Q_BLOCK / 2];
};
static_assert(sizeof(q4_block) == 18, "no padding");

// How the rows of K or V are stored. Quantized rows are rotated by hadamard() first, see sc-quant.h.
enum class row_type : int32_t { f16 = 0, q8_0 = 1, q4_0 = 2 };

// Bytes of a row of d values; d is a whole number of blocks where the type has blocks.
constexpr int64_t row_size(row_type t, int64_t d) {
    return t == row_type::f16 ? d * (int64_t) sizeof(f16)
                              : d / Q_BLOCK * (int64_t) (t == row_type::q8_0 ? sizeof(q8_block) : sizeof(q4_block));
}

} // namespace semcache
